# SPDX-License-Identifier: Apache-2.0
"""A repository in a folder: an object is a file that appears under its name complete and durable, or never.

Content goes into a file without a name (O_TMPFILE) and on to the disk; only then a link gives the file its name, so a
name never leads to content that a power cut could take back (docs/design/repository.md, "Durability"). Objects that
are staged wait for their names together, while the disk writes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterator, Sequence

from stasis.backup.repo.store import Buffer, ObjectInfo, refuse_size
from stasis.errors import NotFoundError, PermissionDeniedError, RepositoryError, StasisError, StorageError
from stasis.linux import files, mounts

__all__ = ["LocalStore"]

BATCH_OBJECTS = 128
BATCH_BYTES = 128 << 20
STRETCH = 64 << 10
"""Bytes of one write. Longer ones have the file system take longer folios, of memory that was not in use lately: 85
packs of 960 KiB took 28 ms of processor time this way, and 100 in one write each (docs/design/performance.md)."""
MOST_THREADS = 8
SHARED_LAG = 60.0  # acdirmax of nfs(5): for so long another host may see an old directory
SHARED_FILESYSTEMS = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "glusterfs", "ocfs2", "gfs2", "lustre", "afs")
TEMPORARY = "tmp"  # folder of files that wait for their name, where O_TMPFILE is not supported
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR)  # the kernel's answers where a file system lacks it (open(2), BUGS)
NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # link(2)
NO_WRITEBACK = (errno.EINVAL, errno.ESPIPE, errno.ENOSYS)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LocalStore:
    """Objects as files below a folder."""

    cheap_lookup = True

    def __init__(self, path: str, *, create: bool = True) -> None:
        """create: make the folder where it is missing."""
        self.path = os.path.abspath(path)
        self._create = create
        self.url = self.path
        self.parallelism = max(2, min(MOST_THREADS, os.cpu_count() or 2))
        self.listing_lag = SHARED_LAG if _is_shared(self.path) else 0.0
        self._lock = threading.Lock()  # of the fields below; held for moments only
        self._naming = threading.Lock()  # held by the one thread that gives names
        self._staged: dict[str, _Nameless] = {}
        self._staged_bytes = 0
        self._failure: OSError | None = None

    def put(self, name: str, *parts: Buffer) -> bool:
        with self._explained(name):
            nameless = self._write(name, parts)
            try:
                os.fsync(nameless.fd)
                new = nameless.link(self._full(name))
            finally:
                nameless.close()
            self._sync_folders(os.path.dirname(self._full(name)))
            return new

    def stage(self, name: str, *parts: Buffer) -> bool:
        with self._explained(name):
            self._raise_failure()
            nameless = self._write(name, parts)
            nameless.start_writeback()
            with self._lock:
                if name in self._staged:
                    nameless.close()
                    return False
                self._staged[name] = nameless
                self._staged_bytes += nameless.size
                full = len(self._staged) >= BATCH_OBJECTS or self._staged_bytes >= BATCH_BYTES
            if full:
                self._name_staged()
            return True

    def get(self, name: str) -> bytes:
        with self._explained(name), open(self._open(name), "rb", buffering=0) as file:
            refuse_size(name, self.url, os.fstat(file.fileno()).st_size)
            return file.read()

    def get_into(self, name: str, buffers: Sequence[memoryview]) -> int:
        with self._explained(name):
            fd = self._open(name)
            try:
                size = os.fstat(fd).st_size
                done = os.preadv(fd, buffers, 0)
                if done < min(size, sum(map(len, buffers))):
                    raise OSError(errno.EIO, "short read")
                return size
            finally:
                os.close(fd)

    def exists(self, name: str) -> bool:
        return name in self._staged or self.stat(name) is not None

    def stat(self, name: str) -> ObjectInfo | None:
        with self._explained(name):
            try:
                status = os.stat(self._full(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return ObjectInfo(name, status.st_size, status.st_mtime)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._explained(prefix):
            yield from self._walk(prefix)

    def delete(self, name: str) -> None:
        with self._explained(name), contextlib.suppress(FileNotFoundError):
            os.unlink(self._full(name))

    def sync(self) -> None:
        with self._explained(""):
            self._name_staged()
            self._refuse_if_gone()
            files.sync_filesystem(self.path)
            self._raise_failure()

    def clean(self) -> int:
        with self._explained(TEMPORARY):
            folder = self._full(TEMPORARY)
            names = os.listdir(folder) if os.path.isdir(folder) else []
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
            return len(names)

    def close(self) -> None:
        with self._naming, self._lock:
            staged, self._staged, self._staged_bytes = self._staged, {}, 0
        for nameless in staged.values():
            nameless.close()

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(self._full(prefix)))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                if name != TEMPORARY:
                    yield from self._walk(name)
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted since
                status = entry.stat()
                yield ObjectInfo(name, status.st_size, status.st_mtime)

    def _name_staged(self) -> None:
        """Wait until what is staged is on the disk, then give it names. Other threads may go on staging meanwhile."""
        with self._naming:
            self._raise_failure()
            with self._lock:
                batch = dict(self._staged)
            try:
                for nameless in batch.values():
                    os.fdatasync(nameless.fd)
                for name, nameless in batch.items():
                    nameless.link(self._full(name))
            except OSError as error:
                # The kernel tells of a failed writeback once: a second fdatasync would promise what is not so.
                self._failure = error
                raise
            with self._lock:
                for name in batch:
                    del self._staged[name]
                self._staged_bytes -= sum(nameless.size for nameless in batch.values())
            for nameless in batch.values():
                nameless.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _open(self, name: str) -> int:
        if name in self._staged:
            self._name_staged()
        return os.open(self._full(name), os.O_RDONLY | os.O_CLOEXEC)

    def _write(self, name: str, parts: Sequence[Buffer]) -> _Nameless:
        folder = os.path.dirname(self._full(name))
        try:
            nameless = _Nameless.create(folder, self._full(TEMPORARY))
        except FileNotFoundError:
            self._make(folder)
            nameless = _Nameless.create(folder, self._full(TEMPORARY))
        try:
            nameless.write(parts)
        except BaseException:
            nameless.close()
            raise
        return nameless

    def _make(self, folder: str) -> None:
        if self._create:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        self._refuse_if_gone()
        os.makedirs(folder, mode=0o700, exist_ok=True)

    def _refuse_if_gone(self) -> None:
        """Not to fill the disk below a place where another one was mounted a moment ago."""
        if not os.path.isdir(self.path):
            raise RepositoryError(f"the repository {self.url} is gone", hint="is its disk still mounted?")

    def _sync_folders(self, folder: str) -> None:
        """Make the names in a folder of the repository durable, and its own up to the repository's."""
        while len(folder) >= len(self.path):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            folder = os.path.dirname(folder)

    def _full(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"{name} is not in the repository {self.url}") from error
        except NotADirectoryError as error:
            raise RepositoryError(f"{self.url} is no folder", hint="a repository is a folder, or a URL") from error
        except OSError as error:
            raise _explain(error, self._full(name)) from error


class _Nameless:
    """A file that is written and has no name in the repository yet."""

    def __init__(self, fd: int, temporary: str | None) -> None:
        self.fd = fd
        self.size = 0
        self._temporary = temporary

    @classmethod
    def create(cls, folder: str, temporary_folder: str) -> _Nameless:
        """Raises FileNotFoundError when there is no such folder."""
        try:
            return cls(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), None)
        except OSError as error:
            if error.errno not in NO_TMPFILE:
                raise
        os.makedirs(temporary_folder, mode=0o700, exist_ok=True)
        path = os.path.join(temporary_folder, secrets.token_hex(16))
        return cls(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600), path)

    def write(self, parts: Sequence[Buffer]) -> None:
        for stretch in _stretches(parts):
            length = sum(map(len, stretch))
            done = os.writev(self.fd, stretch)
            if done < length:  # nearly full
                rest = memoryview(b"".join(stretch))
                while done < length:
                    done += os.write(self.fd, rest[done:])
            self.size += length

    def start_writeback(self) -> None:
        """Let the disk begin. 128 chunks of 1 MiB took 0.08 s with the fdatasync that follows, 0.14 s without this."""
        try:
            files.start_writeback(self.fd, 0, self.size)
        except OSError as error:
            if error.errno not in NO_WRITEBACK:
                raise

    def link(self, path: str) -> bool:
        """Give the file its name; False when another one has it."""
        try:
            if self._temporary is None:
                files.link_unnamed(self.fd, path)
            else:
                _link_or_rename(self._temporary, path)
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        os.close(self.fd)
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)


def _stretches(parts: Sequence[Buffer]) -> Iterator[list[memoryview]]:
    """The parts in groups of STRETCH bytes."""
    group: list[memoryview] = []
    room = STRETCH
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            group.append(view[:room])
            view, room = view[room:], room - len(group[-1])
            if not room:
                yield group
                group, room = [], STRETCH
    if group:
        yield group


def _is_shared(path: str) -> bool:
    """Whether other hosts may have the file system too, and see its directories late."""
    path = os.path.realpath(path)
    inside = [mount for mount in mounts.mounts() if os.path.commonpath((mount.target, path)) == mount.target]
    kind = max(reversed(inside), key=lambda mount: len(mount.target)).fstype if inside else ""
    return kind.startswith(SHARED_FILESYSTEMS)


def _link_or_rename(temporary: str, path: str) -> None:
    """Where a file system has no links (FAT, some network file systems), what appears in between is replaced: names are
    random or follow from the content, so it can only be the same."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        if os.path.exists(path):
            raise FileExistsError(errno.EEXIST, "exists", path) from error
        os.rename(temporary, path)


def _explain(error: OSError, path: str) -> StasisError:
    number = error.errno or 0
    text = f"{path}: {os.strerror(number)}"
    if number in FULL:
        return StorageError(text, hint="make room, then run the command again: nothing in the repository is lost",
                            errno=number)
    if number in REFUSED:
        return PermissionDeniedError(text, hint="this user must be allowed to read and write there", errno=number)
    return StasisError(text, hint="look for errors of the disk in the kernel's log", errno=number)
