# SPDX-License-Identifier: Apache-2.0
"""`stasis repo init` and `stasis repo key` as people and scripts call them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stasis.backup.repo import keys
from stasis.cli.main import main
from stasis.errors import ExitCode

Run = Callable[..., str]


@pytest.fixture
def repo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place for a repository that the environment names and opens."""
    for name in [name for name in os.environ if name.startswith("STASIS_PASSPHRASE")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(keys, "SCRYPT_N", 16)
    monkeypatch.setenv("STASIS_PASSPHRASE", "correct horse")
    monkeypatch.setenv("STASIS_REPO", str(tmp_path / "repo"))
    return tmp_path / "repo"


@pytest.fixture
def stasis(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line that must end with `code`; what it printed, on standard error where it must fail."""

    def run(*arguments: object, code: ExitCode = ExitCode.OK) -> str:
        assert main([str(argument) for argument in arguments]) == code, capsys.readouterr()
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def test_a_repository_from_nothing_and_its_keys(stasis: Run, repo: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    made = json.loads(stasis("repo", "init", repo, "--chunk-size", "4M", "--json"))
    assert (made["chunk_size"], made["compression"], made["encrypted"]) == (4 << 20, "zstd", True)
    (tmp_path / "key").write_bytes(os.urandom(32))
    added = json.loads(stasis("repo", "key", "add", "--new-key-file", tmp_path / "key", "--label", "office", "--json"))
    listed = json.loads(stasis("backup", "key", "list", "--json"))
    first = next(key["id"] for key in listed if key["id"] != added["id"])
    monkeypatch.delenv("STASIS_PASSPHRASE")
    assert "removed the passphrase" in stasis("repo", "key", "remove", first[:6], "--key-file", tmp_path / "key")
    assert "office" in stasis("repo", "key", "list", "--key-file", tmp_path / "key")
    stasis("repo", "key", "remove", added["id"], "--key-file", tmp_path / "key", code=ExitCode.USAGE)


def test_each_way_to_fail_has_its_code(stasis: Run, repo: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no repository" in stasis("repo", "key", "list", code=ExitCode.REPOSITORY)
    stasis("repo", "init", repo, "--no-encryption", code=ExitCode.USAGE)
    stasis("repo", "init", repo, "--chunk-size", "5000", code=ExitCode.USAGE)
    stasis("repo", "init", repo)
    stasis("repo", "init", repo, code=ExitCode.REPOSITORY)
    monkeypatch.setenv("STASIS_PASSPHRASE", "wrong")
    stasis("repo", "key", "list", code=ExitCode.PASSPHRASE)
    error = json.loads(stasis("repo", "key", "list", "--json", code=ExitCode.PASSPHRASE))
    assert (error["error"], error["exit_code"]) == ("PassphraseError", ExitCode.PASSPHRASE)
    monkeypatch.delenv("STASIS_PASSPHRASE")
    assert "STASIS_PASSPHRASE_FILE" in stasis("repo", "key", "list", code=ExitCode.PASSPHRASE)
    monkeypatch.setenv("STASIS_PASSPHRASE_COMMAND", "echo 'correct horse'")
    stasis("repo", "key", "add", code=ExitCode.USAGE)
    monkeypatch.setenv("STASIS_PASSPHRASE_COMMAND", "false a-secret")
    said = stasis("repo", "key", "list", code=ExitCode.PASSPHRASE)
    assert ("false: status 1" in said, "a-secret" in said) == (True, False)
    monkeypatch.setenv("STASIS_PASSPHRASE_COMMAND", "echo 'correct horse'")
    (tmp_path / "file").touch()
    assert "is no folder" in stasis("repo", "key", "list", "--repo", tmp_path / "file", code=ExitCode.REPOSITORY)
    assert "is no folder" in stasis("repo", "init", tmp_path / "file" / "below", code=ExitCode.REPOSITORY)
    config = (repo / "config").read_bytes()
    (repo / "config").write_bytes(config[:-1])
    assert "config" in stasis("repo", "key", "list", code=ExitCode.DAMAGED)
    (repo / "config").write_bytes(config[:8] + b"\x07" + config[9:])
    assert "format 7" in stasis("repo", "key", "list", code=ExitCode.REPOSITORY)
    monkeypatch.delenv("STASIS_REPO")
    assert "STASIS_REPO" in stasis("repo", "key", "list", code=ExitCode.USAGE)


def test_a_readable_repository_is_made_only_on_purpose(stasis: Run, repo: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STASIS_PASSPHRASE")
    stasis("repo", "init", repo, code=ExitCode.PASSPHRASE)
    assert not repo.exists()
    stasis("repo", "init", repo, "--no-encryption", "--compression", "none")
    assert json.loads(stasis("repo", "key", "list", "--json")) == []
    monkeypatch.setenv("STASIS_PASSPHRASE", "x")
    assert "not encrypted although" in stasis("repo", "key", "list", code=ExitCode.REPOSITORY)
