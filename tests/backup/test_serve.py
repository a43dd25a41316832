# SPDX-License-Identifier: Apache-2.0
"""`stasis backup serve` and `diff` as users and their tools meet them."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stasis.backup.repo import Manifest, Repository, Secrets
from stasis.cli.main import main
from stasis.errors import ExitCode, LockedError
from stasis.nbd.client import Client
from stasis.nbd.tls import TlsConfig
from tests.backup.s3 import S3Server
from tests.backup.stored import CHUNK, backup_of
from tests.nbd.certificates import make_certificates
from tests.runner import Stasis

SIZE = 40 * CHUNK + 512
Serve = Callable[..., "contextlib.AbstractContextManager[list[str]]"]


def contents(seed: int) -> bytes:
    """Random chunks; every third is a hole."""
    draw = random.Random(seed)
    return b"".join(bytes(CHUNK) if number % 3 == 1 else draw.randbytes(CHUNK) for number in range(41))[:SIZE]


def changed(data: bytes) -> bytes:
    new = bytearray(data)
    new[5 * CHUNK : 5 * CHUNK + 10] = b"0123456789"
    new[6 * CHUNK : 7 * CHUNK] = bytes(CHUNK)
    new[20 * CHUNK + 4096 : 20 * CHUNK + 8192] = bytes(4096)
    return bytes(new)


OLD = contents(1)
NEW = changed(OLD)
DIFFERENT = [(5 * CHUNK, CHUNK, False), (6 * CHUNK, CHUNK, True), (20 * CHUNK, CHUNK, False)]


class Stored:
    """A repository with an older and a newer backup of one disk, and one of another."""

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        with Repository.init(self.url, secret=None, chunk_size=CHUNK) as repository:
            self.old: Manifest = backup_of(repository, OLD)
            self.new: Manifest = backup_of(repository, NEW)
            self.other: Manifest = backup_of(repository, contents(3)[: 7 * CHUNK], device="other")

    @contextlib.contextmanager
    def opened(self) -> Iterator[Repository]:
        with Repository.open(self.url, Secrets.none()) as repository:
            yield repository


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "repo")


@pytest.fixture
def serve(stasis: Stasis, stored: Stored) -> Serve:
    """serve(ARGUMENT...): the URIs that the command printed, while it runs; it must end well and quietly."""

    @contextlib.contextmanager
    def run(*arguments: str | Path, complaints: str = "") -> Iterator[list[str]]:
        count = sum(len(str(argument)) == 64 for argument in arguments) or 1
        with stasis.popen("backup", "serve", *arguments, "--repo", stored.url) as process:
            try:
                assert process.stdout is not None
                yield [process.stdout.readline().rstrip("\n") for _ in range(count)]
            finally:
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert complaints in said if complaints else not said

    return run


def test_served_backup_reads_as_the_disk_was(serve: Serve, stored: Stored, seed: int) -> None:
    draw = random.Random(seed)
    with serve(stored.new.id) as [uri], Client.connect(uri) as client:
        assert (client.size, client.read_only) == (SIZE, True)
        for _ in range(200):
            offset = draw.randrange(SIZE)
            length = min(draw.choice([1, 512, 4096, CHUNK, 5 * CHUNK]), SIZE - offset)
            assert client.pread(offset, length) == NEW[offset : offset + length]


@pytest.mark.tool("nbdcopy", "qemu-img")
def test_copies_made_by_others_are_equal(serve: Serve, stored: Stored, tmp_path: Path) -> None:
    with serve(stored.new.id) as [uri]:
        subprocess.run(["nbdcopy", uri, tmp_path / "a"], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", uri, tmp_path / "b"], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == NEW


@pytest.mark.tool("nbdinfo", "qemu-img")
def test_others_read_the_allocation_and_the_one_dirty_bitmap(serve: Serve, stored: Stored) -> None:
    bitmap = f"qemu:dirty-bitmap:{stored.old.id}"
    with serve(stored.new.id, "--against", stored.old.id[:12]) as [uri]:
        shown = run_json("nbdinfo", "--json", uri)["exports"][0]
        assert shown["contexts"] == ["base:allocation", bitmap]
        zeroes = [(e["offset"], e["length"]) for e in run_json("nbdinfo", "--json", "--map", uri) if e["type"] == 3]
        dirty = [(e["offset"], e["length"]) for e in run_json("nbdinfo", "--json", f"--map={bitmap}", uri) if e["type"]]
        options = f"driver=nbd,{server_options(uri)},x-dirty-bitmap={bitmap}"
        mapped = run_json("qemu-img", "map", "--output=json", "--image-opts", options)
    assert zeroes[:3] == [(CHUNK, CHUNK), (4 * CHUNK, CHUNK), (6 * CHUNK, 2 * CHUNK)]
    assert dirty == [(5 * CHUNK, 2 * CHUNK), (20 * CHUNK, CHUNK)]
    assert [(e["start"], e["length"]) for e in mapped if not e["data"]] == dirty


def run_json(*command: str) -> Any:
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def server_options(uri: str) -> str:
    export, _, socket = uri.removeprefix("nbd+unix:///").partition("?socket=")
    return f"server.type=unix,server.path={socket},export={export}"


@pytest.mark.tool("nbdinfo")
def test_sockets_that_are_passed_in_are_used_and_nothing_is_printed(stasis: Stasis, stored: Stored) -> None:
    command = ["nbdinfo", "--size", "--", "[", *stasis.command, "backup", "serve", "latest", "--device", "disk",
               "--repo", stored.url, "]"]
    result = subprocess.run(command, env=stasis.environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"{SIZE}\n"


def test_several_backups_are_served_and_found_by_id_or_device(serve: Serve, stored: Stored) -> None:
    with serve(stored.new.id, stored.other.id, "--against", stored.old.id[:12]) as uris:
        for uri, backup in zip(uris, (stored.new, stored.other), strict=True):
            assert f"/{backup.id}?" in uri
            with Client.connect(uri) as client:
                assert client.size == backup.size
        with Client.connect(uris[0].replace(stored.new.id, "other")) as client:
            assert client.pread(0, 100) == contents(3)[:100]


def test_tcp_on_loopback_and_json(stasis: Stasis, stored: Stored) -> None:
    arguments = ["backup", "serve", stored.old.id, "--tcp", "127.0.0.1:0", "--json", "--repo", stored.url]
    with stasis.popen(*arguments) as process:
        assert process.stdout is not None
        [served] = json.loads(process.stdout.readline())
        with Client.connect(served["uri"]) as client:
            assert client.pread(0, 512) == OLD[:512]
        process.terminate()
        assert process.wait(60) == 0
    assert (served["id"], served["device"], served["size"], served["against"]) == (stored.old.id, "disk", SIZE, None)


@pytest.mark.tool("openssl")
def test_tcp_with_certificates(serve: Serve, stored: Stored, tmp_path: Path) -> None:
    server, client, stranger = make_certificates(tmp_path)
    with serve(stored.new.id, "--tcp", "127.0.0.1:0", "--tls-certificates", server) as [uri]:
        assert uri.startswith("nbds://127.0.0.1:")
        with Client.connect(uri, tls=TlsConfig(client)) as known:
            assert known.pread(5 * CHUNK, 10) == b"0123456789"
        with pytest.raises(OSError), Client.connect(uri, tls=TlsConfig(stranger)) as unknown:
            unknown.pread(0, 1)


def test_backup_of_nothing_can_be_served(serve: Serve, stored: Stored) -> None:
    with stored.opened() as repository:
        empty = backup_of(repository, b"", device="empty")
    for more in ([], ["--overlay"]):
        with serve(empty.id, *more) as [uri], Client.connect(uri) as client:
            assert client.size == 0


def test_what_is_written_to_the_overlay_ends_with_the_server(serve: Serve, stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    for _ in range(2):
        with serve("--overlay", tmp_path / "scratch", stored.new.id) as [uri], Client.connect(uri) as client:
            assert client.pread(0, SIZE) == NEW
            client.pwrite(CHUNK - 100, b"w" * 200)
            client.trim(2 * CHUNK, 3 * CHUNK)
            assert client.pread(CHUNK - 100, 200) == b"w" * 200
            assert client.pread(2 * CHUNK, 3 * CHUNK) == bytes(3 * CHUNK)
        assert list((tmp_path / "scratch").iterdir()) == []


def test_prune_is_locked_out_until_the_server_ends(serve: Serve, stored: Stored) -> None:
    with stored.opened() as repository:
        with serve(stored.new.id), pytest.raises(LockedError, match="serve"), repository.lock_exclusive("prune"):
            pass
        with repository.lock_exclusive("prune"):
            pass


def test_altered_chunk_is_an_error_of_its_reads_and_named(serve: Serve, stored: Stored) -> None:
    with stored.opened() as repository:
        name = repository.index(stored.new).name(3).hex()
    [path] = Path(stored.url).rglob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with serve(stored.new.id, complaints=name) as [uri], Client.connect(uri) as client:
        with pytest.raises(OSError, match="error"):
            client.pread(3 * CHUNK + 5, 1)
        assert client.pread(2 * CHUNK, CHUNK) == NEW[2 * CHUNK : 3 * CHUNK]


def test_object_store_that_fails_for_a_while_only_takes_longer(
    stasis: Stasis, s3_server: S3Server, s3_url: str
) -> None:
    with Repository.init(s3_url, secret=None, chunk_size=CHUNK) as repository:
        backup = backup_of(repository, NEW)
    stasis.environment.update(s3_server.environment)
    with stasis.popen("backup", "serve", backup.id, "--repo", s3_url) as process:
        assert process.stdout is not None
        with Client.connect(process.stdout.readline().rstrip("\n")) as client:
            s3_server.misbehave("fail", 3)
            assert client.pread(0, SIZE) == NEW
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_and_its_socket(stasis: Stasis, stored: Stored, short_dir: Path, number: signal.Signals) -> None:
    arguments = ["backup", "serve", "latest", "--socket", short_dir / "s", "--repo", stored.url]
    with stasis.popen(*arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(f"?socket={short_dir}/s\n")
        process.send_signal(number)
        assert process.wait(60) == 0
    assert not (short_dir / "s").exists()
    with stored.opened() as repository:
        assert repository.locks() == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            (["dead"], ExitCode.NOT_FOUND, "dead"),
            (["OLD", "OLD"], ExitCode.USAGE, "named twice"),
            (["OLD", "--tcp", "0.0.0.0:0"], ExitCode.USAGE, "can be reached by others"),
            (["OLD", "--tcp", "127.0.0.1:0", "--socket", "x"], ExitCode.USAGE, "both given"),
            (["OLD", "OTHER", "--against", "NEW", "--against", "OLD"], ExitCode.USAGE, "two backups of disk"),
            (["OLD", "NEW", "--against", "OTHER"], ExitCode.USAGE, "no served backup is of the device"),
            (["OLD", "--socket", "/nowhere/s"], ExitCode.FAILURE, "cannot listen on /nowhere/s: No such file"),
            (["OLD", "--overlay", "/nowhere"], ExitCode.NOT_FOUND, "/nowhere is no directory"),
        ],
    )
    def test_serve(
        self, stored: Stored, capsys: pytest.CaptureFixture[str], arguments: list[str], code: ExitCode, text: str
    ) -> None:
        ids = {"OLD": stored.old.id, "NEW": stored.new.id, "OTHER": stored.other.id}
        given = [ids.get(word, word) for word in arguments]
        assert main(["backup", "serve", *given, "--repo", stored.url]) == code
        assert text in capsys.readouterr().err
        with stored.opened() as repository:
            assert repository.locks() == []

    def test_socket_of_another_server(self, stasis: Stasis, stored: Stored, serve: Serve, short_dir: Path) -> None:
        with serve(stored.old.id, "--socket", short_dir / "s"):
            arguments = ["backup", "serve", stored.new.id, "--socket", short_dir / "s", "--repo", stored.url]
            assert "another server" in stasis.fail(ExitCode.BUSY, *arguments)


    def test_backup_with_chunks_of_another_size(self, stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
        """Whoever can write to a repository without encryption can put one there."""
        with stored.opened() as repository:
            wrong = repository.publish(replace(stored.old, chunk_size=2 * CHUNK, id=""))
        assert main(["backup", "serve", wrong.id, "--repo", stored.url]) == ExitCode.DAMAGED
        assert main(["backup", "diff", stored.old.id, wrong.id, "--repo", stored.url]) == ExitCode.DAMAGED
        assert f"chunks of {2 * CHUNK} bytes" in capsys.readouterr().err


class TestDiff:
    def test_extents_in_json_and_in_lines(self, stasis: Stasis, stored: Stored) -> None:
        pair = (stored.old.id, stored.new.id, "--repo", stored.url)
        found = stasis.json("backup", "diff", *pair)
        assert [(e["offset"], e["length"], e["zero"]) for e in found] == DIFFERENT
        lines = stasis("backup", "diff", *pair).splitlines()
        assert lines == [f"{offset} {length} {'zero' if zero else 'data'}" for offset, length, zero in DIFFERENT]

    def test_pages_exactness_and_refusals(self, stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
        def diff(base: Manifest, *more: str) -> tuple[int, str, str]:
            code = main(["backup", "diff", base.id, stored.new.id, "--repo", stored.url, *more])
            return code, *capsys.readouterr()

        _, first, _ = diff(stored.old, "--limit", "2")
        _, rest, _ = diff(stored.old, "--offset", str(7 * CHUNK))
        _, exact, _ = diff(stored.old, "--exact", "--json")
        assert (first + rest).splitlines() == [
            f"{offset} {length} {'zero' if zero else 'data'}" for offset, length, zero in DIFFERENT
        ]
        assert [(e["offset"], e["length"], e["zero"]) for e in json.loads(exact)] == [
            (5 * CHUNK, 4096, False), (6 * CHUNK, CHUNK, True), (20 * CHUNK + 4096, 4096, True)]
        assert diff(stored.new) == (0, "", "")
        assert diff(stored.new, "--json") == (0, "[]\n", "")
        for option, value, text in (("--offset", "1T", "not within"), ("--limit", "-1", "no number of extents")):
            code, _, said = diff(stored.old, option, value)
            assert code == ExitCode.USAGE
            assert text in said
