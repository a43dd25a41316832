# SPDX-License-Identifier: Apache-2.0
"""A repository in a folder: an object is a file that appears under its name complete, or never.

Content goes into a file without a name (O_TMPFILE), and a link gives it its name. Between the two lies a flush, so that
a name never leads to a file whose content a power cut could take back (docs/design/repository.md, "Durability").
Objects that are staged share one flush (syncfs) per batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from stasis.backup.repo.store import Buffer, ObjectInfo
from stasis.errors import NotFoundError, PermissionDeniedError, RepositoryError, StasisError, StorageError

__all__ = ["LocalStore"]

BATCH_OBJECTS = 256
BATCH_BYTES = 256 << 20
TEMPORARY = "tmp"  # folder of files that wait for their name, where O_TMPFILE is not supported
AT_SYMLINK_FOLLOW = 0x400
AT_FDCWD = -100
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LocalStore:
    """Objects as files below a folder."""

    listing_lag = 0.0
    cheap_lookup = True

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.url = self.path
        self.parallelism = max(2, min(8, os.cpu_count() or 2))
        self._lock = threading.Lock()
        self._staged: dict[str, _Unnamed] = {}
        self._staged_bytes = 0

    def put(self, name: str, *parts: Buffer) -> bool:
        with self._explained(name):
            unnamed = self._write(name, parts)
            try:
                os.fsync(unnamed.fd)
                new = self._give_name(name, unnamed)
            finally:
                unnamed.close()
            self._sync_folder(os.path.dirname(self._full(name)))
            return new

    def stage(self, name: str, *parts: Buffer) -> bool:
        with self._explained(name):
            unnamed = self._write(name, parts)
            with self._lock:
                if name in self._staged:
                    unnamed.close()
                    return False
                self._staged[name] = unnamed
                self._staged_bytes += sum(len(part) for part in parts)
                full = len(self._staged) >= BATCH_OBJECTS or self._staged_bytes >= BATCH_BYTES
            if full:
                self._name_staged()
            return True

    def get(self, name: str) -> bytes:
        with self._explained(name):
            fd = self._open(name)
            with open(fd, "rb", buffering=0) as file:
                return file.read()

    def get_into(self, name: str, buffers: Sequence[memoryview]) -> int:
        with self._explained(name):
            fd = self._open(name)
            try:
                size = os.fstat(fd).st_size
                wanted = min(size, sum(len(buffer) for buffer in buffers))
                if os.preadv(fd, buffers, 0) < wanted:
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
            yield from self._walk(self._full(prefix))

    def _walk(self, folder: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = os.path.relpath(entry.path, self.path)
            if entry.is_dir(follow_symlinks=False):
                if name != TEMPORARY:
                    yield from self._walk(entry.path)
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted since
                status = entry.stat()
                yield ObjectInfo(name, status.st_size, status.st_mtime)

    def delete(self, name: str) -> None:
        with self._explained(name), contextlib.suppress(FileNotFoundError):
            os.unlink(self._full(name))

    def sync(self) -> None:
        with self._explained(""):
            self._name_staged()
            self._syncfs()

    def clean(self) -> int:
        with self._explained(TEMPORARY):
            folder = self._full(TEMPORARY)
            names = os.listdir(folder) if os.path.isdir(folder) else []
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
            return len(names)

    def close(self) -> None:
        with self._lock:
            staged, self._staged, self._staged_bytes = self._staged, {}, 0
        for unnamed in staged.values():
            unnamed.close()

    def _name_staged(self) -> None:
        """Flush what is staged, then give it names. Not under the lock: other threads go on staging meanwhile."""
        with self._lock:
            staged = dict(self._staged)
        if not staged:
            return
        self._syncfs()
        for name, unnamed in staged.items():
            with self._lock:
                if self._staged.get(name) is not unnamed:
                    continue  # another thread was quicker
                self._give_name(name, unnamed)
                del self._staged[name]
                self._staged_bytes -= os.fstat(unnamed.fd).st_size
            unnamed.close()

    def _open(self, name: str) -> int:
        if name in self._staged:
            self._name_staged()
        return os.open(self._full(name), os.O_RDONLY | os.O_CLOEXEC)

    def _write(self, name: str, parts: Sequence[Buffer]) -> _Unnamed:
        folder = os.path.dirname(self._full(name))
        try:
            unnamed = _Unnamed.create(folder, self._full(TEMPORARY))
        except FileNotFoundError:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            unnamed = _Unnamed.create(folder, self._full(TEMPORARY))
        try:
            _write_all(unnamed.fd, parts)
        except BaseException:
            unnamed.close()
            raise
        return unnamed

    def _give_name(self, name: str, unnamed: _Unnamed) -> bool:
        try:
            unnamed.link(self._full(name))
        except FileExistsError:
            return False
        return True

    def _sync_folder(self, folder: str) -> None:
        """Make the names in a folder durable, and those of the folders it is in."""
        while len(folder) >= len(self.path):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            folder = os.path.dirname(folder)

    def _syncfs(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), "syncfs")
        finally:
            os.close(fd)

    def _full(self, name: str) -> str:
        return os.path.join(self.path, name) if name else self.path

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"{name} is not in the repository {self.url}") from error
        except OSError as error:
            raise _explain(error, Path(self._full(name))) from error


class _Unnamed:
    """A file that is being written and has no name in the repository yet."""

    def __init__(self, fd: int, temporary: str | None) -> None:
        self.fd = fd
        self._temporary = temporary

    @classmethod
    def create(cls, folder: str, temporary_folder: str) -> _Unnamed:
        """Raises FileNotFoundError when there is no such folder."""
        try:
            return cls(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), None)
        except OSError as error:
            if error.errno not in NO_TMPFILE or not os.path.isdir(folder):
                raise
        os.makedirs(temporary_folder, mode=0o700, exist_ok=True)
        path = os.path.join(temporary_folder, secrets.token_hex(16))
        return cls(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600), path)

    def link(self, path: str) -> None:
        """Give the file its name. Raises FileExistsError."""
        if self._temporary is not None:
            os.link(self._temporary, path)
            return
        source = f"/proc/self/fd/{self.fd}".encode()
        if _libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)

    def close(self) -> None:
        os.close(self.fd)
        if self._temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)


def _write_all(fd: int, parts: Sequence[Buffer]) -> None:
    total = sum(len(part) for part in parts)
    written = os.writev(fd, parts)
    if written < total:  # the disk is nearly full, or the object larger than one call writes
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            rest = rest[os.write(fd, rest):]


def _explain(error: OSError, path: Path) -> StasisError:
    number = error.errno or 0
    text = f"{path}: {os.strerror(number)}"
    if number in FULL:
        return StorageError(text, hint="make room, then run the command again: nothing in the repository is lost",
                            errno=number)
    if number in REFUSED:
        return PermissionDeniedError(text, hint="the repository must be writable for this user", errno=number)
    return RepositoryError(text, errno=number)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.linkat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_libc.syncfs.argtypes = (ctypes.c_int,)
