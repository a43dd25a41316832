# SPDX-License-Identifier: Apache-2.0
"""The commands that keep a repository in order, as people and programs call them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stasis.backup.repo import Repository, Secret, Secrets
from stasis.cli.main import main
from stasis.errors import ExitCode
from tests.backup.stored import CHUNK, backup_of, content_of


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """One that the commands find, with a backup on each of four days and one of another device."""
    monkeypatch.setenv("STASIS_REPO", str(tmp_path / "r"))
    made = Repository.init(str(tmp_path / "r"), secret=None, chunk_size=CHUNK)
    source = random.Random(1)
    for day in (1, 2, 3, 4):
        backup_of(made, source.randbytes(2 * CHUNK), time=f"2026-03-0{day}T10:00:00.000000Z", set_id=f"{day}000",
                  tags=("first",) if day == 1 else ())
    backup_of(made, source.randbytes(CHUNK), time="2026-03-01T09:00:00.000000Z", device="other", set_id="1000")
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code, capsys.readouterr()
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(run(capsys, *arguments, "--json"))


def last_line(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """The summary of a command that prints JSON lines."""
    line: dict[str, Any] = json.loads(run(capsys, *arguments, "--json", code=code).splitlines()[-1])
    assert line["message_type"] == "summary"
    return line


def test_what_can_be_read_is_listed_beside_a_damaged_manifest(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = [backup.id for backup in repository.backups()]
    (tmp_path / "r" / "backups" / first).write_bytes(b"not a manifest")
    assert main(["backup", "list", "--json"]) == ExitCode.DAMAGED
    printed = capsys.readouterr()
    assert [each["id"] for each in json.loads(printed.out)] == others
    assert first in json.loads(printed.err)["message"]
    assert main(["backup", "show", "latest"]) == ExitCode.DAMAGED  # it might have been the latest
    assert "by its id" in capsys.readouterr().err
    assert as_json(capsys, "backup", "show", others[0])["id"] == others[0]


def test_create_splits_tags_as_the_others_do_and_refuses_what_cannot_be_seen(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").write_bytes(b"image")
    directories = ("--run-dir", str(tmp_path / "run"), "--state-dir", str(tmp_path / "state"))
    create = ("backup", "create", str(tmp_path / "image"), *directories)
    run(capsys, *create, "--tag", "x,y", "--tag", "z")
    assert [each["tags"] for each in as_json(capsys, "backup", "list", "--tag", "x")] == [["x", "y", "z"]]
    for option in (("--tag", "a\nb"), ("--tag", "a,,b"), ("--host", "a\x1b[31mb"), ("--host", " ")):
        run(capsys, *create, *option, code=ExitCode.USAGE)


def test_a_table_holds_no_commands_for_the_terminal(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    backup_of(repository, b"x", time="2026-03-09T10:00:00.000000Z", device="a\x1b[2Jb\nc")
    assert "  a\\x1b[2Jb\\nc  " in run(capsys, "backup", "list")


def test_after_a_prune_a_new_backup_is_sound_where_a_chunk_was_damaged(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    data = b"a chunk of one byte over and over"
    damaged = backup_of(repository, data, time="2026-03-08T10:00:00.000000Z")
    name = repository.index(damaged).name(0).hex()
    chunk = Path(repository.url) / "chunks" / name[:2] / name
    chunk.write_bytes(chunk.read_bytes()[:-1])
    run(capsys, "repo", "check", "--read-data", code=ExitCode.DAMAGED)
    run(capsys, "backup", "forget", damaged.id, "--prune")
    backup_of(Repository.open(repository.url, Secrets.of(None)), data, time="2026-03-09T10:00:00.000000Z")
    assert "nothing is wrong" in run(capsys, "repo", "check", "--read-data")


def test_list_and_show(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    every = as_json(capsys, "backup", "list")
    assert [each["time"][:10] for each in every] == ["2026-03-01"] * 2 + [f"2026-03-0{day}" for day in (2, 3, 4)]
    assert {"id", "set", "host", "device", "size", "time", "kind", "parent", "tags"} <= set(every[0])
    assert [each["device"] for each in as_json(capsys, "backup", "list", "--set", "1000")] == ["other", "disk"]
    assert len(as_json(capsys, "backup", "list", "--tag", "first")) == 1
    assert as_json(capsys, "backup", "list", "--host", "nobody") == []
    assert as_json(capsys, "backup", "show", "latest", "--device", "other") == every[0]
    assert as_json(capsys, "backup", "show", every[3]["id"][:10]) == every[3]
    assert as_json(capsys, "backup", "show", every[3]["id"][:10].upper()) == every[3]
    table = run(capsys, "backup", "list")
    assert every[4]["id"][:12] in table
    assert "128 KiB" in table
    assert "device_identity" not in run(capsys, "backup", "show", "latest")
    assert main(["backup", "show", "ffff0000"]) == ExitCode.NOT_FOUND


def test_forget_by_rules(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    before = repository.backup_ids()
    dry = last_line(capsys, "backup", "forget", "--keep-last", "2", "--keep-tag", "first", "--dry-run")
    assert len(dry["forgotten"]) == 1
    assert repository.backup_ids() == before
    text = run(capsys, "backup", "forget", "--keep-last", "2", "--keep-tag", "first", "--prune")
    assert "1 forgotten" in text
    assert "deleted 2 chunks" in text
    assert sorted({*before} - {*repository.backup_ids()}) == dry["forgotten"]
    groups = last_line(capsys, "backup", "forget", "--keep-yearly", "1", "--group-by", "host")["groups"]
    assert {tuple(kept["reasons"]) for kept in groups[0]["keep"]} == {("yearly",), ("newest of its device",)}


def test_forget_by_id_takes_the_last_one_too(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = repository.resolve("latest", device="other").id
    assert last_line(capsys, "backup", "forget", chosen[:8])["forgotten"] == [chosen]
    assert chosen not in repository.backup_ids()


@pytest.mark.parametrize("arguments", [
    (), ("--keep-last", "0"), ("--keep-last", "-1"), ("--keep-last", "x"), ("--keep-within", "soon"),
    ("abcd", "--keep-last", "1"), ("--keep-last", "1", "--group-by", "colour"), ("--keep-tag", "a,,b"),
])
def test_forget_does_nothing_without_sense(repository: Repository, arguments: tuple[str, ...]) -> None:
    before = repository.backup_ids()
    assert main(["backup", "forget", *arguments]) == ExitCode.USAGE
    assert repository.backup_ids() == before


def test_forget_of_what_is_not_there(repository: Repository) -> None:
    assert main(["backup", "forget", "ffff0000"]) == ExitCode.NOT_FOUND


def test_tags(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    id_ = repository.resolve("latest").id
    assert as_json(capsys, "backup", "tag", id_[:8], "--add", "b,a")[0]["tags"] == ["a", "b"]
    assert as_json(capsys, "backup", "tag", id_[:8], "--remove", "b", "--add", "c")[0]["tags"] == ["a", "c"]
    assert as_json(capsys, "backup", "tag", "latest", "--set", "")[0]["tags"] == []
    assert as_json(capsys, "backup", "show", id_)["tags"] == []
    assert main(["backup", "tag", "latest", "--set", "x", "--add", "y"]) == ExitCode.USAGE
    assert main(["backup", "tag", "latest"]) == ExitCode.USAGE


def test_check_tells_by_its_exit_code(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing is wrong" in run(capsys, "repo", "check", "--read-data")
    assert "--seed" in run(capsys, "repo", "check", "--read-data-subset", "50%")
    chunk = next(info.name for info in repository.store.list("chunks"))
    path = Path(repository.url) / chunk
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    summary = last_line(capsys, "repo", "check", "--read-data", code=ExitCode.DAMAGED)
    assert [problem["object"] for problem in summary["problems"]] == [chunk]
    assert len(summary["damaged_backups"]) == 1
    assert main(["backup", "check", "--read-data"]) == ExitCode.DAMAGED
    shown = capsys.readouterr()
    assert chunk in shown.err
    assert "1 object of the repository" in shown.err
    assert "forget those backups, prune, and make new ones" in shown.err
    assert summary["damaged_backups"][0][:12] in shown.out
    assert main(["repo", "check", "--read-data", "--read-data-subset", "5"]) == ExitCode.USAGE
    assert main(["repo", "check", "--read-data-subset", "200%"]) == ExitCode.USAGE


def test_prune_stats_and_unlock_are_in_both_groups(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.remove_backup(repository.resolve("latest").id)
    assert last_line(capsys, "repo", "prune", "--dry-run")["chunks_removed"] == 2
    assert last_line(capsys, "backup", "prune")["chunks_removed"] == 2
    assert as_json(capsys, "repo", "stats")["backups"] == as_json(capsys, "backup", "stats")["backups"] == 4
    with repository.lock_shared("create"):
        assert main(["repo", "prune"]) == ExitCode.LOCKED
        assert "create on" in capsys.readouterr().err
        kept = as_json(capsys, "repo", "unlock")
        assert (kept["removed"], [lock["purpose"] for lock in kept["left"]]) == ([], ["create"])
        assert len(as_json(capsys, "backup", "unlock", "--all")["removed"]) == 1
    assert "deleted 0 chunks" in run(capsys, "repo", "prune")


def test_copy_takes_the_secret_of_the_other_repository_from_the_environment(
        repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    secret = Secret(b"second")
    target = Repository.init(str(tmp_path / "target"), secret=secret, chunk_size=2 * CHUNK)
    command = ("backup", "copy", "--device", "other", "--to", target.url)
    assert main(command) == ExitCode.PASSPHRASE
    capsys.readouterr()
    monkeypatch.setenv("STASIS_TO_PASSPHRASE", "second")
    (copied,) = last_line(capsys, *command)["copied"]
    original = repository.resolve("latest", device="other")
    assert copied["source"] == original.id
    assert content_of(target, target.backup(copied["id"])) == content_of(repository, original)
    assert "there already" in run(capsys, *command)
    assert main(["backup", "copy", "latest", "--to", repository.url]) == ExitCode.REPOSITORY  # a passphrase for nothing
    monkeypatch.delenv("STASIS_TO_PASSPHRASE")
    assert main(["backup", "copy", "latest", "--to", repository.url]) == ExitCode.USAGE
