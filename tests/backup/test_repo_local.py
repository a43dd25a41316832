# SPDX-License-Identifier: Apache-2.0
"""A folder as a store: names that never lead to something incomplete, whatever is killed, full or broken."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from stasis.backup.repo import local
from stasis.backup.repo.local import LocalStore
from stasis.errors import NotFoundError, PermissionDeniedError, StasisError, StorageError
from stasis.linux import files
from stasis.linux.mounts import Mount

# Writes objects whose content follows from their name, staged and put, until it is killed.
WRITER = """
import hashlib, os, random, sys
from stasis.backup.repo import local
local.BATCH_OBJECTS = 7
if sys.argv[2] == "named":
    local.os.O_TMPFILE = 0  # the folder is opened for writing: EISDIR, as where O_TMPFILE is not known
store = local.LocalStore(sys.argv[1])
print("ready", flush=True)
while True:
    seed = os.urandom(8).hex()
    content = hashlib.sha256(seed.encode()).digest() * random.randrange(1, 5000)
    (store.put if random.random() < 0.1 else store.stage)(f"chunks/{seed[:2]}/{seed}-{len(content)}", content)
"""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "repo"))


def test_an_object_is_never_replaced(store: LocalStore) -> None:
    assert store.put("a/b", b"first", b" part")
    assert not store.put("a/b", b"second")
    store.stage("a/b", b"third")
    store.sync()
    assert store.get("a/b") == b"first part"


def test_what_is_staged_is_there_for_this_process_and_for_all_after_sync(store: LocalStore) -> None:
    other = LocalStore(store.path)
    assert store.stage("a/b", b"content")
    assert not store.stage("a/b", b"content")
    assert (store.exists("a/b"), other.exists("a/b")) == (True, False)
    store.sync()
    assert other.get("a/b") == b"content"
    store.stage("a/c", b"read at once")
    assert store.get("a/c") == b"read at once"
    store.stage("a/d", b"lost")
    store.close()
    assert not LocalStore(store.path).exists("a/d")


def test_a_full_batch_gets_its_names_without_sync(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BATCH_OBJECTS", 3)
    for number in range(4):
        store.stage(f"a/{number}", b"x")
    assert sorted(info.name for info in LocalStore(store.path).list("a")) == ["a/0", "a/1", "a/2"]
    store.close()


def test_listing_shows_objects_and_nothing_else(store: LocalStore) -> None:
    for name in ("config", "a/b/c", "a/d"):
        store.put(name, name.encode())
    (Path(store.path) / "tmp").mkdir()
    (Path(store.path) / "tmp" / "left").write_bytes(b"of a killed writer")
    assert {(info.name, info.size) for info in store.list("")} == {("config", 6), ("a/b/c", 5), ("a/d", 3)}
    assert {info.name for info in store.list("a")} == {"a/b/c", "a/d"}
    assert list(store.list("none")) == []
    assert (store.clean(), store.clean()) == (1, 0)


def test_what_is_not_there(store: LocalStore) -> None:
    assert not store.exists("a/b")
    assert store.stat("a/b") is None
    store.delete("a/b")
    for get in (store.get, lambda name: store.get_into(name, [memoryview(bytearray(4))])):
        with pytest.raises(NotFoundError, match="a/b"):
            get("a/b")


def test_reading_into_buffers(store: LocalStore) -> None:
    store.put("a", b"0123456789")
    small, large = bytearray(4), bytearray(20)
    assert store.get_into("a", [memoryview(small)]) == 10
    assert store.get_into("a", [memoryview(small), memoryview(large)]) == 10
    assert (small, large) == (b"0123", b"456789" + bytes(14))


def test_a_repository_is_closed_to_other_users(store: LocalStore) -> None:
    store.put("a/b", b"x")
    modes = {path.stat().st_mode & 0o777 for path in (Path(store.path), Path(store.path) / "a")}
    assert (modes, (Path(store.path) / "a/b").stat().st_mode & 0o777) == ({0o700}, 0o600)


def test_a_repository_in_a_folder_that_others_own(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies around it can be passed through, but neither read nor written."""
    os.mkdir(store.path)
    real_open = os.open

    def refuse(path: str, *rest: int) -> int:
        if path == os.path.dirname(store.path):
            raise PermissionError(errno.EACCES, "closed", path)
        return real_open(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert store.put("a/b", b"x")
    store.sync()


def test_content_is_on_the_disk_before_it_has_a_name(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of system calls is the promise against a power cut; docs/design/repository.md builds on it."""
    calls: list[tuple[str, Any]] = []

    def record(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (calls.append((name, args)), real(*args))[1])

    for name in ("fsync", "fdatasync"):
        record(os, name)
    for name in ("link_unnamed", "sync_filesystem"):
        record(files, name)
    for number in range(3):
        store.stage(f"a/{number}", b"x")
    assert calls == []
    store.sync()
    assert [name for name, _ in calls] == ["fdatasync"] * 3 + ["link_unnamed"] * 3 + ["sync_filesystem"]
    assert [args[0] for _, args in calls[:3]] == [args[0] for _, args in calls[3:6]]
    calls.clear()
    store.put("a/put", b"x")
    assert [name for name, _ in calls] == ["fsync", "link_unnamed", "fsync", "fsync"]  # a, repo


def test_a_failed_writeback_is_never_forgotten(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of it once; a second fdatasync would succeed, and the content be lost all the same."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "lost")))
        store.stage("a/b", b"x")
        with pytest.raises(StasisError, match="Input/output error"):
            store.sync()
    with pytest.raises(StasisError, match="Input/output error"):
        store.sync()
    with pytest.raises(StasisError, match="Input/output error"):
        store.stage("a/c", b"x")
    assert list(LocalStore(store.path).list("")) == []
    store.close()


def test_a_full_disk_leaves_nothing_half_written(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a/b", b"before")
    monkeypatch.setattr(os, "writev", lambda fd, parts: os.write(fd, b"hal"))
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: _full() if len(data) > 3 else real_write(fd, data))
    for call in (store.put, store.stage):
        with pytest.raises(StorageError, match="No space left"):
            call("a/c", b"half of this")
    monkeypatch.undo()
    store.sync()
    assert [info.name for info in store.list("")] == ["a/b"]


def _full() -> int:
    raise OSError(errno.ENOSPC, "full")


def test_a_short_write_goes_on(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "writev", lambda fd, parts: real_write(fd, bytes(parts[0])[:2]))
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:3]))
    store.put("a", b"0123", b"456789")
    assert store.get("a") == b"0123456789"


@pytest.mark.parametrize("links", [True, False])
def test_file_systems_without_unnamed_files_or_links(store: LocalStore, links: bool,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", 0)
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    assert store.put("a/b", b"first")
    assert not store.put("a/b", b"second")
    store.stage("a/c", b"staged")
    store.sync()
    assert {info.name: store.get(info.name) for info in store.list("")} == {"a/b": b"first", "a/c": b"staged"}
    assert store.clean() == 0


def test_refusal_is_told_as_one(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.raises(PermissionDeniedError, match="Read-only file system"):
        store.put("a", b"x")


def test_other_hosts_file_systems_list_late(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [Mount("disk", "/", "ext4", False, 1), Mount("server:/", "/mnt", "nfs4", False, 2),
              Mount("disk", "/mnt/local", "xfs", False, 3)]
    monkeypatch.setattr(local.mounts, "mounts", lambda: mounts)
    lags = {path: LocalStore(path).listing_lag for path in ("/repo", "/mnt/repo", "/mnt/local/repo", "/mntx")}
    assert lags == {"/repo": 0, "/mnt/repo": local.SHARED_LAG, "/mnt/local/repo": 0, "/mntx": 0}


def test_many_threads_store_the_same_and_other_things(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BATCH_OBJECTS", 5)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in _draws(seed):
                if not store.exists(f"a/{number}"):
                    store.stage(f"a/{number}", b"%d" % number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.sync()
    assert failures == []
    assert all(store.get(info.name) == info.name[2:].encode() for info in store.list("a"))
    assert {int(info.name[2:]) for info in store.list("a")} == {number for seed in range(6) for number in _draws(seed)}


def _draws(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100) for _ in range(60)]


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_a_killed_writer_leaves_no_partial_object(tmp_path: Path, way: str, seed: int) -> None:
    draw = random.Random(seed)
    repo, named = tmp_path / "repo", 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(repo), way], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
            while not any(LocalStore(str(repo)).list("")):
                assert process.poll() is None
            threading.Event().wait(draw.uniform(0, 0.1))  # anywhere in what it does
            process.send_signal(signal.SIGKILL)
            process.wait()
        for info in LocalStore(str(repo)).list(""):
            seed_, _, size = info.name.rpartition("/")[2].partition("-")
            content = LocalStore(str(repo)).get(info.name)
            assert len(content) == int(size)
            assert content[:32] == hashlib.sha256(seed_.encode()).digest()
            assert content == content[:32] * (len(content) // 32)
            named += 1
    assert named > 4
    assert way == "named" or not (repo / "tmp").exists()
    LocalStore(str(repo)).clean()
    assert way == "unnamed" or os.listdir(repo / "tmp") == []
