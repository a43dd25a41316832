# SPDX-License-Identifier: Apache-2.0
"""Repositories as jobs use them: what is published comes back, and what was altered is named and never returned."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from stasis.backup.repo import ZERO, Manifest, Repository, Secret, Secrets, keys, manifest
from stasis.errors import DamagedError, NotFoundError, PermissionDeniedError, RepositoryError, StasisError, UsageError

CHUNK = 65536
SECRET = Secret(b"correct horse")

# A backup of three chunks of 16 MiB by each thread that the repository likes to have, with all the buffers of a job.
LARGE_CHUNKS = """
import os, sys, threading
from stasis.backup.repo import Repository, Secrets, keys
keys.SCRYPT_N = 16
with Repository.open(sys.argv[1], Secrets.from_environment()) as repository:
    def work():
        writer, reader = repository.chunk_writer(), repository.chunk_reader()
        buffer = memoryview(bytearray(repository.chunk_size))
        for _ in range(3):
            buffer[: 8 << 20] = os.urandom(8 << 20)
            name = writer.store(buffer).name
            reader.fetch(name, buffer)
    threads = [threading.Thread(target=work) for _ in range(repository.parallelism)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
# Not ru_maxrss, which remembers the memory of the process that this one was forked from.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture(autouse=True)
def _cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_N", 16)


@pytest.fixture(params=["folder", "cloud"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "repo") if request.param == "folder" else f"memory:///{uuid.uuid4()}"


def content(number: int, length: int = CHUNK) -> bytes:
    """Content of a chunk: 0 is zeroes, even numbers compress, odd ones do not."""
    if number == 0:
        return bytes(length)
    if number % 2 == 0:
        return (b"%d " % number * length)[:length]
    return hashlib.shake_128(b"%d" % number).digest(length)


def draft(repository: Repository, size: int, segments: tuple[bytes, ...], **fields: object) -> Manifest:
    values: dict[str, object] = {
        "set_id": "set", "host": "host", "device": "disk", "path": "/dev/disk", "source_kind": "file",
        "device_identity": "x", "size": size, "chunk_size": repository.chunk_size,
        "time": "2026-01-01T00:00:00.000000Z", "kind": "full", "segments": tuple(name.hex() for name in segments),
    }
    return Manifest(**{**values, **fields})  # type: ignore[arg-type]


def store(repository: Repository, numbers: list[int], tail: int = 0, **fields: object) -> Manifest:
    """A backup of a device whose chunks are `content(number)`, and a last one of `tail` bytes."""
    size = len(numbers) * CHUNK + tail
    writer, builder = repository.chunk_writer(), repository.index_builder(size)
    for place, number in enumerate([*numbers, 99] if tail else numbers):
        length = min(CHUNK, size - place * CHUNK)
        builder.set(place, writer.store(memoryview(content(number, length))).name)
    return repository.publish(draft(repository, size, builder.finish(), **fields))


def read(repository: Repository, backup: Manifest) -> bytes:
    reader, index = repository.chunk_reader(), repository.index(backup)
    device = bytearray(backup.size)
    for number, name in enumerate(index.names()):
        start = number * CHUNK
        reader.fetch(name, memoryview(device)[start : start + index.chunk_length(number)])
    return bytes(device)


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_what_is_published_comes_back(url: str, secret: Secret | None, compression: str) -> None:
    Repository.init(url, secret=secret, chunk_size=CHUNK, compression=compression).close()
    numbers = [1, 2, 0, 1, 0, 4, 3]
    with Repository.open(url, Secrets.of(secret)) as repository:
        made = store(repository, numbers, tail=100, tags=("b", "a"), statistics={"seconds": 3})
    with Repository.open(url, Secrets.of(secret), read_only=True) as repository:
        assert repository.backups() == [made]
        assert read(repository, made) == b"".join(map(content, numbers)) + content(99, 100)
        assert made.chunk_count == 8


def test_content_is_stored_once_and_zeroes_never(url: str) -> None:
    with Repository.init(url, secret=SECRET, chunk_size=CHUNK) as repository:
        writer = repository.chunk_writer()
        stored = [writer.store(memoryview(content(number))) for number in (1, 2, 1, 0, 2)]
        assert [chunk.new for chunk in stored] == [True, True, False, False, False]
        assert (stored[3].name, stored[0].name) == (ZERO, stored[2].name)
        assert stored[1].stored_bytes < 200 < CHUNK < stored[0].stored_bytes
        repository.sync()
        assert len(list(repository.store.list("chunks"))) == 2
        assert [writer.store_known(name) for name in (ZERO, stored[0].name, b"\1" * 32)] == [True, True, False]
        assert repository.has_chunk(stored[1].name)


def test_compression_saves_what_it_can(tmp_path: Path) -> None:
    sizes = {}
    for compression in ("zstd", "none"):
        with Repository.init(str(tmp_path / compression), secret=None, compression=compression) as repository:
            data = memoryview(Path(os.__file__).read_bytes() * 10)
            sizes[compression] = repository.chunk_writer().store(data).stored_bytes / len(data)
    assert sizes["none"] > 1
    assert sizes["zstd"] < 0.4


# Finding backups

def test_backups_are_found_as_git_finds_commits(url: str) -> None:
    with Repository.init(url, secret=None, chunk_size=CHUNK) as repository:
        made = [store(repository, [number], host=f"host{number % 2}", device=f"disk{number}",
                      time=f"2026-01-{9 - number:02}T00:00:00.000000Z") for number in range(4)]
        assert repository.backups() == made[::-1]
        assert sorted(repository.backup_ids()) == sorted(one.id for one in made)
        assert [repository.resolve(one.id[:8]) for one in made] == made
        assert repository.resolve("latest") == made[0]
        assert repository.resolve("latest", host="host1") == made[1]
        assert repository.resolve("latest", device="disk3") == made[3]
        for text in ("latest", "0123456789abcdef"):
            with pytest.raises(NotFoundError):
                repository.resolve(text, host="elsewhere")
        with pytest.raises(UsageError, match="too short"):
            repository.resolve(made[0].id[:3])


def test_an_id_that_means_two_backups_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Repository.init(url, secret=None, chunk_size=CHUNK) as repository:
        monkeypatch.setattr(repository, "backup_ids", lambda: ["abcd" + "0" * 60, "abcd" + "1" * 60])
        with pytest.raises(UsageError, match="2 backups"):
            repository.resolve("abcd")


def test_tags_change_and_manifests_do_not(url: str) -> None:
    with Repository.init(url, secret=SECRET, chunk_size=CHUNK) as repository:
        made = store(repository, [1], tags=("first",))
        before = repository.store.get(f"backups/{made.id}")
        for tags in (("b", "a"), ("c",), ()):
            repository.set_tags(made.id, tags)
            assert repository.tags(made.id) == tuple(sorted(tags))
            assert repository.backups()[0].tags == tuple(sorted(tags))
        assert repository.store.get(f"backups/{made.id}") == before
        assert repository.manifest(made.id).tags == ("first",)
        with pytest.raises(NotFoundError):
            repository.set_tags("0" * 64, ["x"])
        repository.remove_backup(made.id)
        assert (repository.backups(), list(repository.store.list("tags"))) == ([], [])
        with pytest.raises(NotFoundError):
            repository.backup(made.id)


def test_manifests_of_other_versions_and_bad_ones() -> None:
    fields = {"set_id": "s", "host": "h", "device": "d", "path": "p", "source_kind": "file", "device_identity": "i",
              "size": 1, "chunk_size": 65536, "time": "t", "kind": "full", "segments": ("ab" * 32,)}
    good = manifest.encode(Manifest(**fields))  # type: ignore[arg-type]
    assert manifest.encode(manifest.decode(good, "")) == good
    assert manifest.decode(good[:-1] + b',"of a later version":1}', "id").id == "id"
    for old, new in ((b'"size":1', b'"size":-1'), (b'"size":1', b'"size":true'), (b'"kind":"full"', b'"kind":"x"'),
                     (b'"ab', b'"xy'), (b'"chunk_size":65536', b'"chunk_size":0'), (b'"tags":[]', b'"tags":[1]'),
                     (b'"size":1', b'"size":0'), (b'"parent":null', b'"parent":"x"'), (b'"size":1,', b"")):
        assert old in good
        with pytest.raises(ValueError):
            manifest.decode(good.replace(old, new, 1), "")
    for text in (b"[]", b"", b"{}", b"\xff"):
        with pytest.raises(ValueError):
            manifest.decode(text, "")


# Whoever can write to the store can alter everything, and must be found out

def flip(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


ALTERATIONS: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flip, "cut": lambda data: data[:-1], "cut in the header": lambda data: data[:20],
    "emptied": lambda data: b"", "longer": lambda data: data + b"\0", "zeroed": lambda data: bytes(len(data)),
    "deleted": lambda data: None,
}


def read_all(repository: Repository) -> list[bytes]:
    return [read(repository, backup) for backup in repository.backups()]


@pytest.mark.parametrize("alteration", ALTERATIONS)
@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_every_alteration_is_named(tmp_path: Path, alteration: str, secret: Secret | None, compression: str) -> None:
    with Repository.init(str(tmp_path), secret=secret, chunk_size=CHUNK, compression=compression) as repository:
        made = store(repository, [1, 2, 3])
        repository.set_tags(made.id, ["tag"])
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        original = path.read_bytes()
        altered = ALTERATIONS[alteration](original)
        path.unlink()
        if altered is not None:
            path.write_bytes(altered)
        _expect_named(tmp_path, secret, path, gone=altered is None)
        path.write_bytes(original)
    with Repository.open(str(tmp_path), Secrets.of(secret)) as repository:
        assert read_all(repository) == [b"".join(map(content, [1, 2, 3]))]


def _expect_named(root: Path, secret: Secret | None, path: Path, *, gone: bool) -> None:
    name = str(path.relative_to(root))
    if gone and name.startswith(("backups/", "tags/")):
        return  # that none is missing is told by `check`: nothing here knows that it should be there
    with pytest.raises(StasisError) as info, Repository.open(str(root), Secrets.of(secret)) as repository:
        read_all(repository)
    if gone and name == "config":
        assert "there is no repository" in info.value.message
        return
    assert isinstance(info.value, DamagedError)
    assert ("no keys left" if gone and name.startswith("keys/") else name) in info.value.message


@pytest.mark.parametrize("secret", [None, SECRET])
def test_objects_that_change_places_are_named(tmp_path: Path, secret: Secret | None) -> None:
    with Repository.init(str(tmp_path), secret=secret, chunk_size=CHUNK) as repository:
        store(repository, [1, 3], host="one")
        store(repository, [5, 7], host="two")
    for folder in ("backups", "chunks", "segments"):
        one, other, *_ = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        with Repository.open(str(tmp_path), Secrets.of(secret)) as repository, pytest.raises(DamagedError) as info:
            read_all(repository)
        assert any(path.name in info.value.message for path in (one, other))
        one.write_bytes(first)
        other.write_bytes(second)


def test_a_chunk_forged_by_who_has_the_key_is_found_out(tmp_path: Path) -> None:
    """The digest in the index is the last word, not the tag."""
    from stasis.backup.repo.objects import Kind, object_name

    for secret, compression in ((SECRET, "zstd"), (None, "zstd"), (None, "none")):
        root = tmp_path / f"{compression}{secret is None}"
        with Repository.init(str(root), secret=secret, chunk_size=CHUNK, compression=compression) as repository:
            made = store(repository, [1])
            name = next(repository.index(made).names())
            where = object_name(Kind.CHUNK, name)
            (root / where).write_bytes(repository.codec().seal(Kind.CHUNK, where, content(3)))
            buffer = memoryview(bytearray(b"x" * CHUNK))
            with pytest.raises(DamagedError, match=name.hex()):
                repository.chunk_reader().fetch(name, buffer)
            assert buffer == bytes(CHUNK)


def test_a_repository_opened_to_read_is_not_written_to(url: str) -> None:
    with Repository.init(url, secret=None, chunk_size=CHUNK) as repository:
        made = store(repository, [1])
    with Repository.open(url, Secrets.none(), read_only=True) as repository:
        before = sorted(info.name for info in repository.store.list(""))
        for call in (repository.chunk_writer, lambda: repository.publish(made),
                     lambda: repository.set_tags(made.id, ["x"]), lambda: repository.remove_backup(made.id),
                     lambda: repository.remove_key("x")):
            with pytest.raises(PermissionDeniedError, match="read only"):
                call()
        assert sorted(info.name for info in repository.store.list("")) == before


def test_the_largest_chunks_stay_below_the_limit_of_memory(tmp_path: Path) -> None:
    Repository.init(str(tmp_path), secret=SECRET, chunk_size=16 << 20).close()
    result = subprocess.run([sys.executable, "-c", LARGE_CHUNKS, str(tmp_path)], capture_output=True, text=True,
                            env={**os.environ, "STASIS_PASSPHRASE": SECRET.value.decode()}, check=True)
    assert int(result.stdout) * 1024 < 250 << 20


@pytest.mark.parametrize("secret", [None, SECRET])
def test_the_program_in_the_format_s_description_recovers_a_backup(tmp_path: Path, secret: Secret | None) -> None:
    page = Path(__file__).parents[2] / "docs" / "formats" / "repository.md"
    program = page.read_text().split("```python\n")[1].split("```")[0]
    with Repository.init(str(tmp_path / "repo"), secret=secret, chunk_size=CHUNK) as repository:
        repository.chunk_writer().store(memoryview(b"of another backup"))
        made = store(repository, [1, 0, 2, 3, 0], tail=77)
        expected = read(repository, made)
    subprocess.run([sys.executable, "-c", program, tmp_path / "repo", SECRET.value, made.id, tmp_path / "image"],
                   check=True)
    assert (tmp_path / "image").read_bytes() == expected


def test_what_file_managers_leave_behind_does_no_harm(tmp_path: Path) -> None:
    with Repository.init(str(tmp_path), secret=SECRET, chunk_size=CHUNK) as repository:
        made = store(repository, [1, 2])
        repository.set_tags(made.id, ["tag"])
    for folder in ("", "keys", "backups", "tags", f"tags/{made.id}", "locks", "chunks", "segments"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".DS_Store").write_bytes(b"x")
    with Repository.open(str(tmp_path), Secrets.of(SECRET)) as repository:
        assert [(one.id, one.tags) for one in repository.backups()] == [(made.id, ("tag",))]
        assert (repository.locks(), len(repository.key_slots()), repository.lost_backups()) == ([], 1, [])
        with repository.lock_exclusive("prune"):
            repository.set_tags(made.id, ["other"])
        assert repository.tags(made.id) == ("other",)


@pytest.mark.parametrize("folder", ["config", "backups", "segments", "chunks", "tags", "keys"])
def test_an_object_of_absurd_size_takes_no_memory(tmp_path: Path, folder: str) -> None:
    with Repository.init(str(tmp_path), secret=SECRET, chunk_size=CHUNK) as repository:
        repository.set_tags(store(repository, [1]).id, ["tag"])
    path = next(path for path in [tmp_path / folder, *(tmp_path / folder).rglob("*")] if path.is_file())
    os.truncate(path, 1 << 40)
    with pytest.raises(DamagedError, match=path.name), Repository.open(str(tmp_path), Secrets.of(SECRET)) as repository:
        read_all(repository)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_cannot_be_written_to_can_be_read(tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Repository.init(str(tmp_path), secret=None, chunk_size=CHUNK) as repository:
        made = store(repository, [1])
    real_open = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(error, os.strerror(error), path)
        return real_open(path, flags, *rest)

    with Repository.open(str(tmp_path), Secrets.none(), read_only=True) as repository:
        monkeypatch.setattr(os, "open", refuse)
        with repository.lock_shared("restore") as lease:
            assert lease.valid()
            assert lease.confirm()
            assert read(repository, made) == content(1)
    writer = Repository.open(str(tmp_path), Secrets.none())
    with writer, pytest.raises(StasisError, match="locks"), writer.lock_shared("create"):
        pytest.fail("a writer went on without a lock")


def test_a_repository_that_vanished_is_not_made_anew(tmp_path: Path) -> None:
    """As when its disk is unmounted: what is written then would fill the disk below."""
    Repository.init(str(tmp_path / "repo"), secret=None, chunk_size=CHUNK).close()
    with Repository.open(str(tmp_path / "repo"), Secrets.none()) as repository:
        shutil.move(tmp_path / "repo", tmp_path / "moved")
        for call in (lambda: repository.chunk_writer().store(memoryview(content(1))), repository.sync):
            with pytest.raises(RepositoryError, match="is gone"):
                call()
        assert not (tmp_path / "repo").exists()
