# SPDX-License-Identifier: Apache-2.0
"""Opening a repository: secrets and where they come from, key slots, and configs that somebody altered."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from stasis.backup.repo import Repository, Secret, Secrets, config, keys
from stasis.backup.repo.keys import open_slot, seal_slot
from stasis.backup.repo.local import LocalStore
from stasis.backup.repo.objects import Codec, Header, Keys, Kind
from stasis.errors import DamagedError, NotFoundError, PassphraseError, RepositoryError, StasisError, UsageError

KEY = bytes(range(32))
SECRET = Secret(b"correct horse")


@pytest.fixture(autouse=True)
def _cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_N", 16)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    path = tmp_path / "repo"
    Repository.init(str(path), secret=SECRET).close()
    return path


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def open_with(repo: Path, secret: Secret | None = SECRET) -> Repository:
    return Repository.open(str(repo), Secrets.of(secret))


def test_what_was_decided_at_init_holds(tmp_path: Path) -> None:
    made = Repository.init(str(tmp_path / "a"), secret=SECRET, chunk_size=1 << 22, compression="none")
    with made, open_with(tmp_path / "a") as opened:
        for repository in (made, opened):
            assert (repository.id, repository.chunk_size, repository.compression, repository.encrypted) == (
                made.id, 1 << 22, "none", True)


@pytest.mark.parametrize(("chunk_size", "compression"), [(1 << 15, "zstd"), (1 << 25, "zstd"), (3 << 20, "zstd"),
                                                         (0, "zstd"), (1 << 20, "lzma")])
def test_a_repository_that_makes_no_sense_is_not_made(tmp_path: Path, chunk_size: int, compression: str) -> None:
    with pytest.raises(UsageError):
        Repository.init(str(tmp_path / "a"), secret=None, chunk_size=chunk_size, compression=compression)
    assert os.listdir(tmp_path) == []


def test_init_never_takes_a_place_that_is_not_empty(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="already"):
        Repository.init(str(repo), secret=SECRET)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(RepositoryError, match=r"one\.jpg"):
        Repository.init(str(tmp_path / "photos"), secret=SECRET)
    open_with(repo).close()


def test_init_goes_on_where_a_killed_one_left_a_key(tmp_path: Path) -> None:
    for _ in range(2):
        config.add_slot(LocalStore(str(tmp_path / "a")), os.urandom(32), SECRET, "")
    Repository.init(str(tmp_path / "a"), secret=SECRET).close()
    open_with(tmp_path / "a").close()


def test_of_two_inits_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Repository.init(str(tmp_path / "a"), secret=SECRET).close()
    monkeypatch.setattr(config, "refuse_if_taken", lambda store: None)  # both looked before either wrote
    with pytest.raises(RepositoryError, match="at the same time"):
        Repository.init(str(tmp_path / "a"), secret=Secret(b"other"))
    with open_with(tmp_path / "a") as repository:
        assert len(repository.key_slots()) == 1


def test_wrong_and_missing_secrets(repo: Path) -> None:
    for secret in (Secret(b"wrong"), Secret(SECRET.value, "key-file")):
        with pytest.raises(PassphraseError):
            open_with(repo, secret)
    with pytest.raises(PassphraseError, match="no passphrase"):
        open_with(repo, None)


def test_there_is_no_repository(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RepositoryError, match="no repository"):
            open_with(path)


def test_keys_come_and_go(repo: Path) -> None:
    second = Secret(os.urandom(32), "key-file")
    with open_with(repo) as repository:
        added = repository.add_key(second, "office")
        assert [(slot.kind, slot.label) for slot in sorted(repository.key_slots(), key=lambda slot: slot.label)] == [
            ("passphrase", ""), ("key-file", "office")]
        with pytest.raises(NotFoundError):
            repository.remove_key("")
        with pytest.raises(NotFoundError):
            repository.remove_key("nothing")
    with open_with(repo, second) as repository:
        first = next(slot for slot in repository.key_slots() if slot.id != added.id)
        assert repository.remove_key(first.id[:6]) == first
        with pytest.raises(UsageError, match="only key"):
            repository.remove_key(added.id)
    with pytest.raises(PassphraseError):
        open_with(repo)
    open_with(repo, second).close()


def test_a_readable_repository_has_no_keys(tmp_path: Path) -> None:
    with Repository.init(str(tmp_path / "a"), secret=None) as repository:
        assert repository.key_slots() == []
        with pytest.raises(UsageError, match="not encrypted"):
            repository.add_key(SECRET)


def test_a_damaged_slot_does_not_keep_others_out(repo: Path) -> None:
    with open_with(repo) as repository:
        repository.add_key(Secret(b"second"))
        slots = {slot.id: repo / "keys" / slot.id for slot in repository.key_slots()}
    for broken in slots.values():
        content = broken.read_bytes()
        replace(broken, content[:-1])
        opened = []
        for secret in (SECRET, Secret(b"second")):
            try:
                open_with(repo, secret).close()
                opened.append(secret)
            except DamagedError as error:
                assert broken.name in error.message
        assert len(opened) == 1
        replace(broken, content)


def test_without_any_slot_nothing_opens(repo: Path) -> None:
    for path in (repo / "keys").iterdir():
        path.unlink()
    with pytest.raises(DamagedError, match="no keys left"):
        open_with(repo)


# What somebody may do who can write to the store

def test_an_altered_config_is_refused(repo: Path) -> None:
    content = (repo / "config").read_bytes()
    for place in range(0, len(content), 3):
        altered = bytearray(content)
        altered[place] ^= 0x41
        replace(repo / "config", altered)
        with pytest.raises((DamagedError, RepositoryError)):
            open_with(repo)


def test_a_repository_cannot_be_swapped_for_a_readable_one(repo: Path, tmp_path: Path) -> None:
    with Repository.init(str(tmp_path / "mine"), secret=None) as mine:
        plain = mine.store.get("config")
    replace(repo / "config", plain)
    with pytest.raises(RepositoryError, match="not encrypted although"):
        open_with(repo)


def test_a_config_of_another_key_is_refused(repo: Path, tmp_path: Path) -> None:
    with Repository.init(str(tmp_path / "mine"), secret=SECRET) as mine:
        other = mine.store.get("config")
    replace(repo / "config", other)
    with pytest.raises(DamagedError, match="config"):
        open_with(repo)


def test_a_slot_is_bound_to_its_name_and_to_all_it_says(repo: Path) -> None:
    slot = next((repo / "keys").iterdir())
    content = _slot(slot)
    assert open_slot(content, SECRET, name=f"keys/{slot.name}") is not None
    assert open_slot(content, SECRET, name="keys/another") is None
    for field, value in (("label", "x"), ("host", "x"), ("created", "x"), ("r", 4)):
        altered = json.dumps({**json.loads(content), field: value}).encode()
        assert open_slot(altered, SECRET, name=f"keys/{slot.name}") is None


@pytest.mark.parametrize("change", [
    {"n": 1 << 40}, {"n": 100}, {"n": 0}, {"n": "16"}, {"r": 1 << 30}, {"p": 1 << 30}, {"p": -1}, {"kdf": "md5"},
    {"salt": 5}, {"salt": "zz"}, {"nonce": ""}, {"wrapped": "00"}, {"kind": None}, {"n": True},
])
def test_a_hostile_slot_costs_no_memory_and_is_named(repo: Path, change: dict[str, Any]) -> None:
    slot = next((repo / "keys").iterdir())
    fields = {**json.loads(_slot(slot)), **change}
    _replace_slot(slot, json.dumps(fields).encode())
    with pytest.raises(DamagedError, match=slot.name):
        open_with(repo)


def test_a_slot_of_endless_brackets_is_named(repo: Path) -> None:
    slot = next((repo / "keys").iterdir())
    for content in (b"[" * 100_000, b"[]", b"\xff", b'"text"', b""):
        _replace_slot(slot, content)
        with pytest.raises(DamagedError, match=slot.name):
            open_with(repo)


@pytest.mark.parametrize("change", [{"chunk_size": 5}, {"chunk_size": "x"}, {"compression": "lzma"}, {"version": None}])
def test_a_readable_config_that_makes_no_sense_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with Repository.init(str(tmp_path / "a"), secret=None) as repository:
        codec = repository.codec()
        fields = json.loads(codec.unseal(Kind.CONFIG, "config", repository.store.get("config")))
    replace(tmp_path / "a" / "config", codec.seal(Kind.CONFIG, "config", json.dumps({**fields, **change}).encode()))
    with pytest.raises(DamagedError, match="config"):
        open_with(tmp_path / "a", None)


def test_a_later_version_is_refused_as_such(repo: Path, tmp_path: Path) -> None:
    frame = bytearray((repo / "config").read_bytes())
    frame[8] = 2
    replace(repo / "config", frame)
    with pytest.raises(RepositoryError, match="format 2"):
        open_with(repo)
    codec = Codec(Keys(None), compress=False, where="")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config").write_bytes(codec.seal(Kind.CONFIG, "config", b'{"version": 3}'))
    with pytest.raises(RepositoryError, match="format 3"):
        open_with(tmp_path / "b", None)


def _slot(path: Path) -> bytes:
    return Codec(Keys(None), compress=False, where="").unseal(Kind.KEY, f"keys/{path.name}", path.read_bytes())


def _replace_slot(path: Path, content: bytes) -> None:
    replace(path, Codec(Keys(None), compress=False, where="").seal(Kind.KEY, f"keys/{path.name}", content))


# Where secrets come from

def test_the_environment_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("from file\r\nsecond line\n")
    everything = {"STASIS_PASSPHRASE": "direct", "STASIS_PASSPHRASE_FILE": str(tmp_path / "word"),
                  "STASIS_PASSPHRASE_COMMAND": "echo 'from command' $HOME"}
    found = []
    for name in list(everything):
        found.append(Secrets.from_environment(environment=everything).get("here").value)
        del everything[name]
    assert found == [b"direct", b"from file", b"from command $HOME"]
    assert not Secrets.from_environment(environment={}).given


def test_a_key_file_is_taken_whole_and_comes_first(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\x00\n\xff\n")
    secrets = Secrets.from_environment(str(tmp_path / "key"), environment={"STASIS_PASSPHRASE": "x"})
    assert (secrets.given, secrets.get("here")) == (True, Secret(b"\x00\n\xff\n", "key-file"))


@pytest.mark.parametrize("environment", [
    {"STASIS_PASSPHRASE": ""}, {"STASIS_PASSPHRASE_FILE": "/nonexistent"}, {"STASIS_PASSPHRASE_FILE": "/dev/null"},
    {"STASIS_PASSPHRASE_COMMAND": "false"}, {"STASIS_PASSPHRASE_COMMAND": "/nonexistent"},
    {"STASIS_PASSPHRASE_COMMAND": "true"}, {"STASIS_PASSPHRASE_COMMAND": "echo 'x"},
    {"STASIS_PASSPHRASE_COMMAND": "  "}, {},
])
def test_sources_that_give_nothing(environment: dict[str, str]) -> None:
    with pytest.raises(StasisError) as info:
        Secrets.from_environment(environment=environment).get("here")
    assert isinstance(info.value, (PassphraseError, UsageError))
    assert info.value.hint


def test_a_prompt_asks_once_to_open_and_twice_for_a_new_one() -> None:
    asked: list[str] = []
    answers = ["old", "new", "new", "new", "other"]
    secrets = Secrets.from_environment(prompt=lambda text: (asked.append(text), answers.pop(0))[1], environment={})
    assert (secrets.get("here").value, secrets.get("here").value, len(asked)) == (b"old", b"old", 1)
    assert (secrets.get_new("here").value, len(asked)) == (b"new", 3)
    with pytest.raises(PassphraseError, match="differ"):
        secrets.get_new("here")


def test_a_secret_does_not_show_in_a_traceback() -> None:
    assert "horse" not in repr(SECRET)
    assert "horse" not in str(SECRET)


def test_a_slot_of_these_bytes_opens() -> None:
    """The format, made by hand in docs/formats/repository.md's words: scrypt, then AES-256-GCM."""
    content = seal_slot(KEY, SECRET, name="keys/a", label="", created="c", host="h")
    assert open_slot(content, SECRET, name="keys/a") == KEY
    golden = (
        b'{"created": "2026-01-01T00:00:00Z", "host": "h", "kdf": "scrypt", "kind": "passphrase", "label": "", "n": 16,'
        b' "nonce": "' + b"00" * 12 + b'", "p": 1, "r": 8, "salt": "' + b"11" * 32 + b'", "wrapped": "'
        b"a4664a1a7116db811cec48c9ce310aaf33fc5193fa11e09c3c452f043c9e2859"
        b'e5e28de2887253b21390c951288de0e7"}')
    assert open_slot(golden, SECRET, name="keys/a") == KEY


def test_objects_of_an_encrypted_repository_are_encrypted(repo: Path) -> None:
    with open_with(repo) as repository:
        repository.chunk_writer().store(memoryview(b"SECRET CONTENT " * 5000))
        repository.sync()
        with repository.lock_shared("a purpose that is nobody's business"):
            stored = b"".join(path.read_bytes() for path in repo.rglob("*") if path.is_file())
            protections = {Header.parse(path.read_bytes()).protection for path in repo.rglob("*")  # type: ignore[union-attr]
                           if path.is_file() and path.parent.name != "keys"}
    assert b"SECRET" not in stored
    assert b"purpose" not in stored
    assert protections == {1}
    assert stat.S_IMODE((repo / "config").stat().st_mode) == 0o600
