# SPDX-License-Identifier: Apache-2.0
"""Every exit code of docs/guide/exit-codes.md comes out of a backup command in a situation that is real."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.runner import Stasis
from tests.system.helpers import MIB, Disk, wait_until
from tests.unmounting import unmount

TABLE = Path(__file__).parents[2] / "docs" / "guide" / "exit-codes.md"


@dataclass
class Bench:
    """A repository, and an image that was backed up into it."""

    stasis: Stasis
    path: Path
    seed: int

    @property
    def image(self) -> Path:
        return self.path / "plain.img"

    @property
    def repo(self) -> Path:
        return self.path / "repo"

    def fail(self, code: ExitCode, *arguments: str | Path) -> str:
        return self.stasis.fail(code, "backup", *arguments)

    def disk(self) -> Disk:
        """A served device."""
        return Disk(self.stasis, self.path / "disk.img", MIB, self.seed)

    @contextmanager
    def slow_run(self) -> Iterator[subprocess.Popen[str]]:
        """A backup that would take minutes, and has its locks."""
        slow = ("backup", "create", self.image, "--limit-rate", "4K")
        with self.stasis.popen(*slow) as process:
            wait_until(lambda: any((self.repo / "locks").glob("*")) or process.poll() is not None, "a lock")
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=60)


@pytest.fixture
def bench(stasis: Stasis, short_dir: Path, seed: int) -> Bench:
    made = Bench(stasis, short_dir, seed)
    stasis.environment["STASIS_REPO"] = str(made.repo)
    stasis("repo", "init", made.repo, "--no-encryption", "--chunk-size", "64K")
    made.image.write_bytes(os.urandom(MIB // 2))
    stasis("backup", "create", made.image)
    return made


def _ok(bench: Bench) -> None:
    bench.stasis("backup", "verify", "latest", "--live", bench.image)


def _failure(bench: Bench) -> None:
    assert "status 3" in bench.fail(ExitCode.FAILURE, "create", bench.image, "--post-snapshot", "exit 3")


def _usage(bench: Bench) -> None:
    bench.fail(ExitCode.USAGE, "create", bench.image, "--base", "latest")


def _not_found(bench: Bench) -> None:
    assert "ffff" in bench.fail(ExitCode.NOT_FOUND, "restore", "ffff", bench.path / "out.img")


def _busy(bench: Bench) -> None:
    before = bench.image.read_bytes()
    assert str(bench.image) in bench.fail(ExitCode.BUSY, "restore", "latest", bench.image)
    assert bench.image.read_bytes() == before


def _permission(bench: Bench) -> None:
    for folder in (bench.repo, *(path for path in bench.repo.rglob("*") if path.is_dir())):
        folder.chmod(0o500)
    try:
        if os.geteuid() == 0:  # root without the right to pass over modes
            bench.stasis.command = ["setpriv", "--bounding-set=-dac_override", *bench.stasis.command]
        assert str(bench.repo) in bench.fail(ExitCode.PERMISSION, "create", bench.image)
        bench.stasis("backup", "verify", "latest")  # who may only read can
    finally:
        for folder in (bench.repo, *(path for path in bench.repo.rglob("*") if path.is_dir())):
            folder.chmod(0o700)


def _storage(bench: Bench) -> None:
    small = bench.path / "small.img"
    small.write_bytes(b"small")
    assert str(small) in bench.fail(ExitCode.STORAGE, "restore", "latest", small, "--in-place")


def _generation(bench: Bench) -> None:
    assert "not tracked" in bench.fail(ExitCode.GENERATION, "create", bench.image, "--kind", "incremental")


def _verify(bench: Bench) -> None:
    with bench.image.open("r+b") as file:
        file.write(b"changed")
    bench.fail(ExitCode.VERIFY, "verify", "latest", "--live", bench.image)


def _daemon(bench: Bench) -> None:
    bench.disk()
    bench.stasis("daemon", "stop", "--force")
    run_dir = bench.path / "file"
    run_dir.touch()
    assert str(run_dir) in bench.fail(ExitCode.DAEMON, "create", "disk", "--run-dir", run_dir)


def _state(bench: Bench) -> None:
    bench.disk()
    uuid = bench.stasis("snapshot", "create", "--storage", bench.path, "--limit", "64M", "disk")
    assert uuid in bench.fail(ExitCode.STATE, "create", f"{uuid}:disk")
    bench.stasis("snapshot", "destroy", uuid)


def _unsupported(bench: Bench) -> None:
    bench.stasis.environment["PATH"] = str(bench.path)
    assert "qemu" in bench.fail(ExitCode.UNSUPPORTED, "export", "latest", bench.path / "out.qcow2")


def _partial(bench: Bench) -> None:
    bad = "if [ $4 -lt 200000 ] && [ $(($4 + $3)) -gt 100000 ]; then echo EIO >&2; exit 1; fi; head -c $3 /dev/zero"
    directory = bench.path / "fuse"
    directory.mkdir()
    export = ["[", "nbdkit", "--exit-with-parent", "eval", "get_size=echo 1M", f"pread={bad}", "]"]
    with subprocess.Popen(["nbdfuse", directory / "bad.img", *export], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: (directory / "bad.img").exists() or process.poll() is not None, "nbdfuse")
        try:
            bench.fail(ExitCode.FAILURE, "create", directory / "bad.img")
            result = bench.stasis.run("backup", "create", directory / "bad.img", "--on-read-error", "skip", "--json")
        finally:
            unmount(directory)
    assert result.returncode == ExitCode.PARTIAL, result.stderr
    (backup,) = json.loads(result.stdout.splitlines()[-1])["backups"]
    assert 100_000 <= backup["statistics"]["bytes_unreadable"] < MIB


def _repository(bench: Bench) -> None:
    config = bench.repo / "config"
    content = config.read_bytes()
    config.write_bytes(content[:8] + b"\x09" + content[9:])
    assert "format 9" in bench.fail(ExitCode.REPOSITORY, "list")
    assert "no repository" in bench.fail(ExitCode.REPOSITORY, "list", "--repo", bench.path / "none")


def _locked(bench: Bench) -> None:
    with bench.slow_run():
        bench.fail(ExitCode.LOCKED, "create", bench.image)
        bench.fail(ExitCode.LOCKED, "prune")
    bench.stasis("backup", "prune")


def _passphrase(bench: Bench) -> None:
    bench.stasis.environment |= {"STASIS_REPO": str(bench.path / "secret"), "STASIS_PASSPHRASE": "right"}
    bench.stasis("repo", "init", bench.path / "secret")
    bench.stasis.environment["STASIS_PASSPHRASE"] = "wrong"
    bench.fail(ExitCode.PASSPHRASE, "create", bench.image)


def _tracking(bench: Bench) -> None:
    disk = bench.disk()
    bench.stasis("backup", "create", disk.name)
    with disk.path.open("r+b") as file:
        file.write(b"behind the back")
    bench.fail(ExitCode.TRACKING, "create", disk.name, "--self-check", "100")
    bench.stasis("device", "detach", disk.name)
    bench.stasis("backup", "verify", "latest", "--device", disk.name, "--live", disk.path)


def _damaged(bench: Bench) -> None:
    victim = next(path for path in (bench.repo / "chunks").rglob("*") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    for words in (("restore", "latest", bench.path / "out.img"), ("verify", "latest"), ("check", "--read-data")):
        assert victim.name in bench.fail(ExitCode.DAMAGED, *words)


def _interrupted(bench: Bench) -> None:
    with bench.slow_run() as process:
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, error
    assert "Traceback" not in error
    bench.stasis("backup", "create", bench.image)


SITUATIONS: dict[ExitCode, Callable[[Bench], None]] = {
    ExitCode.OK: _ok, ExitCode.FAILURE: _failure, ExitCode.USAGE: _usage, ExitCode.NOT_FOUND: _not_found,
    ExitCode.BUSY: _busy, ExitCode.PERMISSION: _permission, ExitCode.STORAGE: _storage,
    ExitCode.GENERATION: _generation, ExitCode.VERIFY: _verify, ExitCode.DAEMON: _daemon, ExitCode.STATE: _state,
    ExitCode.UNSUPPORTED: _unsupported, ExitCode.PARTIAL: _partial, ExitCode.REPOSITORY: _repository,
    ExitCode.LOCKED: _locked, ExitCode.PASSPHRASE: _passphrase, ExitCode.TRACKING: _tracking,
    ExitCode.DAMAGED: _damaged, ExitCode.INTERRUPTED: _interrupted,
}  # fmt: skip
NEEDS = {ExitCode.PARTIAL: ("nbdfuse", "nbdkit"), ExitCode.PERMISSION: ("setpriv",)}


def _documented() -> list[ExitCode]:
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", TABLE.read_text(), re.MULTILINE)
    return [ExitCode[name] for number, name in rows if ExitCode[name] == int(number)]


def test_the_table_has_every_code() -> None:
    assert _documented() == sorted(ExitCode)


@pytest.mark.parametrize("code", _documented(), ids=lambda code: code.name)
def test_each_code_comes_from_a_real_situation(code: ExitCode, bench: Bench) -> None:
    missing = [name for name in NEEDS.get(code, ()) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; make deps installs it")
    if code is ExitCode.PARTIAL and os.geteuid() != 0:
        pytest.skip("needs root")
    SITUATIONS[code](bench)
