# SPDX-License-Identifier: Apache-2.0
"""`stasis backup run`: sets are backed up, thinned out and pruned, each once at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from stasis.backup.repo import Repository, Secret, Secrets
from stasis.daemon.runs import SetResult, worst
from stasis.errors import ExitCode, StasisError
from tests.backup.stored import CHUNK, backup_of
from tests.runner import Stasis

CONFIG = """
[repository.main]
url = "{0}/r"

[set.one]
sources = ["{0}/one.img"]
repository = "main"
schedule = "hourly"
tags = ["mine"]
prune = true

[set.one.keep]
last = 2

[set.two]
sources = ["{0}/two.img"]
repository = "main"
pre-snapshot = "{1}"
"""


@pytest.fixture
def config(stasis: Stasis, short_dir: Path) -> Path:
    """Two image files, a repository, and a configuration of two sets; the second has a hook."""
    Repository.init(f"{short_dir}/r", secret=None, chunk_size=CHUNK).close()
    for name in ("one", "two"):
        (short_dir / f"{name}.img").write_bytes(os.urandom(2 * CHUNK))
    return written(short_dir, "true")


def written(folder: Path, hook: str) -> Path:
    path = folder / "backup.toml"
    path.write_text(CONFIG.format(folder, hook))
    return path


def backups(folder: Path) -> list[Any]:
    with Repository.open(f"{folder}/r", Secrets.none()) as repository:
        return repository.backups()


def ran(stasis: Stasis, config: Path, *arguments: str) -> dict[str, Any]:
    lines = stasis("backup", "run", *arguments, "--config", config, "--json").splitlines()
    summary: dict[str, Any] = json.loads(lines[-1])
    assert summary["message_type"] == "summary"
    return summary


def test_all_sets_are_backed_up_and_each_keeps_to_its_rules(stasis: Stasis, config: Path, short_dir: Path) -> None:
    for _ in range(3):
        (short_dir / "one.img").write_bytes(os.urandom(2 * CHUNK))
        summary = ran(stasis, config)
    assert [one["name"] for one in summary["sets"]] == ["one", "two"]
    assert (len(summary["sets"][0]["forgotten"]), summary["sets"][1]["forgotten"]) == (1, [])
    assert summary["sets"][0]["bytes_pruned"] > 2 * CHUNK
    left = backups(short_dir)
    assert [sum(one.device == name for one in left) for name in ("one.img", "two.img")] == [2, 3]
    assert {one.tags for one in left} == {("mine", "set=one"), ("set=two",)}


def test_what_other_hosts_and_other_sets_made_is_never_forgotten(stasis: Stasis, config: Path, short_dir: Path) -> None:
    with Repository.open(f"{short_dir}/r", Secrets.none()) as repository:
        for _ in range(4):
            backup_of(repository, b"x", host="elsewhere", device="one.img", tags=("set=one",))
            backup_of(repository, b"x", device="one.img", tags=("manual",))
    for _ in range(3):
        ran(stasis, config, "one")
    assert len(backups(short_dir)) == 8 + 2


def test_a_schedule_runs_its_sets_and_no_others(stasis: Stasis, config: Path, short_dir: Path) -> None:
    assert [one["name"] for one in ran(stasis, config, "--schedule", "hourly")["sets"]] == ["one"]
    where = ("--config", str(config))
    assert "daily" in stasis.fail(ExitCode.NOT_FOUND, "backup", "run", "--schedule", "daily", *where)
    assert "one or the other" in stasis.fail(ExitCode.USAGE, "backup", "run", "one", "--schedule", "hourly", *where)


def test_a_dry_run_changes_nothing(stasis: Stasis, config: Path, short_dir: Path) -> None:
    summary = ran(stasis, config, "--dry-run")
    assert [one["plans"][0]["bytes_to_read"] for one in summary["sets"]] == [2 * CHUNK, 2 * CHUNK]
    assert backups(short_dir) == []
    assert "two.img: full, would read 128 KiB" in stasis("backup", "run", "two", "--dry-run", "--config", config)


def test_a_set_that_fails_keeps_no_other_from_being_backed_up(stasis: Stasis, config: Path, short_dir: Path) -> None:
    (short_dir / "one.img").unlink()
    result = stasis.run("backup", "run", "--config", config, "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == records[-1]["exit_code"] == ExitCode.NOT_FOUND
    assert [one["exit_code"] for one in records[-1]["sets"]] == [ExitCode.NOT_FOUND, 0]
    assert [one["exit_code"] for one in records if one["message_type"] == "error"] == [ExitCode.NOT_FOUND]
    assert [one.device for one in backups(short_dir)] == ["two.img"]


def test_two_runs_of_one_set_at_once_are_one_too_many(stasis: Stasis, config: Path, short_dir: Path) -> None:
    """The hook of the first run holds it until the second one was refused."""
    os.mkfifo(short_dir / "go")
    written(short_dir, f"echo hook >&2; cat {short_dir}/go")
    with stasis.popen("backup", "run", "two", "--config", config) as first:
        assert first.stderr is not None
        assert first.stderr.readline() == "hook\n"
        said = stasis.fail(ExitCode.LOCKED, "backup", "run", "two", "--config", config)
        assert f"a backup of set two is running already on this host (pid {first.pid})" in said
        (short_dir / "go").write_text("")
        out, _ = first.communicate(timeout=60)
    assert (first.returncode, "two: " in out) == (0, True)
    assert len(backups(short_dir)) == 1


def test_a_run_that_is_terminated_leaves_no_lock(stasis: Stasis, config: Path, short_dir: Path) -> None:
    os.mkfifo(short_dir / "go")
    written(short_dir, f"echo hook >&2; cat {short_dir}/go")
    with stasis.popen("backup", "run", "two", "--config", config) as first:
        assert first.stderr is not None
        assert first.stderr.readline() == "hook\n"
        first.terminate()
        (short_dir / "go").write_text("")
        first.communicate(timeout=60)
    assert first.returncode == ExitCode.INTERRUPTED
    written(short_dir, "true")
    ran(stasis, config, "two")
    with Repository.open(f"{short_dir}/r", Secrets.none()) as repository:
        assert repository.locks() == []


def test_a_hook_that_fails_stops_its_set(stasis: Stasis, config: Path, short_dir: Path) -> None:
    written(short_dir, "exit 3")
    said = stasis.fail(ExitCode.FAILURE, "backup", "run", "two", "--config", config)
    assert "the command before the snapshot failed (status 3): exit 3" in said
    assert backups(short_dir) == []


def test_a_passphrase_comes_from_its_file_and_a_wrong_one_has_its_code(stasis: Stasis, short_dir: Path) -> None:
    (short_dir / "passphrase").write_text("secret\n")
    Repository.init(f"{short_dir}/r", secret=Secret(b"secret"), chunk_size=CHUNK).close()
    (short_dir / "two.img").write_bytes(b"two")
    opened = f'url = "{short_dir}/r"\npassphrase-file = "{short_dir}/passphrase"\n'
    config = short_dir / "backup.toml"
    config.write_text(CONFIG.format(short_dir, "true").replace(f'url = "{short_dir}/r"\n', opened))
    ran(stasis, config, "two")
    (short_dir / "passphrase").write_text("wrong\n")
    stasis.fail(ExitCode.PASSPHRASE, "backup", "run", "two", "--config", config)
    shutil.rmtree(short_dir / "r")
    stasis.fail(ExitCode.REPOSITORY, "backup", "run", "two", "--config", config)


@pytest.mark.parametrize(("codes", "expected"), [
    ([], 0), ([0, 0], 0), ([0, 12, 0], 12), ([12, 16], 16), ([16, 14, 3], 14), ([12, 1], 1),
])
def test_the_exit_code_is_the_worst(codes: list[int], expected: int) -> None:
    def result(code: int) -> SetResult:
        return SetResult("x", error=StasisError("x", exit_code=ExitCode(code)) if code else None)

    assert worst(map(result, codes)) == expected
