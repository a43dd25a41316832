# SPDX-License-Identifier: Apache-2.0
"""The file system's side of a COW file on the protected device: making it, pinning it, giving it back.

All of it is done by a process of its own (daemon/cowhelper.py): the worker that serves the device must never wait for
a file system that waits for it. The worker's side is in ondevice.py; the order of the steps, and why no step can harm
what belongs to somebody else, is in docs/design/datto-on-device.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from stasis.datto.extents import BlockMap, check_extents, probes
from stasis.datto.fitness import check_file_system, check_inode
from stasis.datto.layout import Header
from stasis.datto.opening import check_place
from stasis.errors import BusyError, NotFoundError, StasisError, StateError, StorageError, UnsupportedError
from stasis.linux import blockdev, fiemap, files, immutable, mounts

__all__ = ["Channel", "create", "forget", "release", "temporary_name", "token", "truncate", "verify"]

FILL = 4 << 20


class Channel(Protocol):
    """The worker at the other end."""

    def send(self, **fields: Any) -> None: ...

    def receive(self) -> Mapping[str, Any]:
        """The next request. EOFError if the worker is gone or gave up."""
        ...


def temporary_name(path: str, pid: int) -> str:
    """The name of a file that the helper with this pid has not finished."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{pid}.new")


def _remove_stale(path: str) -> None:
    """Remove what helpers left that were killed together with their workers: a file that is being made is locked."""
    for name in glob.glob(glob.escape(temporary_name(path, 0)).replace(".0.new", ".*.new")):
        with contextlib.suppress(OSError), _opened(name) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            immutable.set_immutable(fd, False)
            os.unlink(name)


def token(key: bytes, offset: int, length: int) -> bytes:
    """What is written at a place of the file to find it again on the device."""
    return hashlib.shake_128(key + offset.to_bytes(8, "little")).digest(length)


# -- making one ---------------------------------------------------------------------------------------------


def create(channel: Channel, path: str, size: int, node: str, in_use: int) -> None:
    """Make, fill, try and pin a file of `size` bytes at `path`, on the file system of `node`.

    `in_use` is the inode of the tracer's present COW file, 0 without one. Each step is told to the worker, which does
    its part before it asks for the next. If it goes away before it says `keep`, nothing stays behind.
    """
    path = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == in_use:
            raise BusyError(f"{path} is in use as a COW file", errno=errno.EBUSY,
                            hint="each file of a series needs a name of its own")
    check_place(path)
    with contextlib.ExitStack() as undo:
        file = _File(path, size, node)
        undo.callback(file.remove)
        blocks = file.allocate()
        channel.send(stretches=blocks.stretches, inode=os.fstat(file.fd).st_ino, relative=_relative(path))
        file.fill(blocks, bytes.fromhex(channel.receive()["token"]))
        file.pin(blocks)
        channel.send(filled=True)
        file.compare(blocks, bytes.fromhex(channel.receive()["token"]))
        channel.send(compared=True)
        channel.receive()
        file.settle(blocks)
        channel.send(pinned=True)
        channel.receive()
        undo.pop_all()
        os.close(file.fd)
        channel.send(kept=True)


class _File:
    """A COW file that is being made, under a name of its own until it is right."""

    def __init__(self, path: str, size: int, node: str) -> None:
        self.path, self.size, self._node = path, size, node
        self._name = temporary_name(path, os.getpid())
        check_file_system(path)
        _remove_stale(path)
        try:
            self.fd = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError(f"{path} cannot be made: {error.strerror}", errno=error.errno or errno.EIO,
                               hint="name a place you may write to") from error
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Give everything back."""
        with contextlib.suppress(OSError):
            immutable.set_immutable(self.fd, False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name)
        os.close(self.fd)

    def allocate(self) -> BlockMap:
        """Take the space, and see where it lies. What was allocated is not written yet."""
        self._try_flag()
        try:
            self._take_space()
        except OSError as error:
            raise StorageError(f"{self.path} cannot have {self.size} bytes: {error.strerror}",
                               errno=error.errno or errno.EIO,
                               hint="-f MIB asks for less; it must hold the index and what will be overwritten"
                               ) from error
        os.fsync(self.fd)
        check_inode(self.fd, self.path)
        return self.blocks(fiemap.FIEMAP_EXTENT_UNWRITTEN)

    def _take_space(self) -> None:
        try:
            files.allocate(self.fd, 0, self.size)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._write_zeroes()  # ext2 and ext3 cannot allocate without writing

    def _write_zeroes(self) -> None:
        zeroes = memoryview(bytes(FILL))
        for start in range(0, self.size, FILL):
            _write(self.fd, zeroes[: min(FILL, self.size - start)], start)
            files.start_writeback(self.fd, start, FILL)

    def _try_flag(self) -> None:
        try:
            immutable.set_immutable(self.fd, True)
            immutable.set_immutable(self.fd, False)
        except OSError as error:
            raise UnsupportedError(f"{self.path} cannot be protected from changes: {error.strerror}",
                                   errno=error.errno or errno.EOPNOTSUPP, hint="name a file on another disk") from error

    def blocks(self, allowed: int = 0) -> BlockMap:
        return blocks_of(self.fd, self.size, self._node, self.path, allowed=allowed)

    def fill(self, blocks: BlockMap, key: bytes) -> None:
        """Write every byte: zeroes, and tokens where the map will be tried. Unwritten extents are none afterwards."""
        tokens = dict(probes(blocks, self.size))
        try:
            self._write_zeroes()
            for offset, length in tokens.items():
                _write(self.fd, memoryview(token(key, offset, length)), offset)
            os.fsync(self.fd)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror}", errno=error.errno or errno.EIO,
                               hint="nothing was changed but for the file, which is gone again") from error

    def pin(self, blocks: BlockMap) -> None:
        """From here on nobody else can write the file or move it, and no page of it is in memory."""
        immutable.set_immutable(self.fd, True)
        os.fsync(self.fd)
        if immutable.has_other_writers(self.fd):
            raise BusyError(f"{self.path} is open for writing: {_holders(self._name) or 'by another program'}",
                            errno=errno.EBUSY, hint="end what writes to it")
        immutable.drop_cache(self.fd)
        if self.blocks() != blocks:
            raise StateError(f"{self.path} was moved while it was made", errno=errno.EBUSY, hint="try again")

    def compare(self, blocks: BlockMap, key: bytes) -> None:
        """Whether what the worker wrote to the device is in the file."""
        drop_below(self._node)
        immutable.drop_cache(self.fd)
        for offset, length in probes(blocks, self.size):
            if os.pread(self.fd, length, offset) != token(key, offset, length):
                raise StateError(f"{self.path} does not lie where the file system says", errno=errno.EINVAL,
                                 hint="name a file on another disk")
        immutable.drop_cache(self.fd)

    def settle(self, blocks: BlockMap) -> None:
        """Give it its name. A file that was there goes, which `check_place` allowed."""
        immutable.set_immutable(self.fd, False)
        with contextlib.suppress(FileNotFoundError), _opened(self.path) as old:
            immutable.set_immutable(old, False)  # left behind by a tracer that is no more
        os.replace(self._name, self.path)
        self._name = self.path
        self.pin(blocks)
        _sync_directory(self.path)


# -- one that is there ---------------------------------------------------------------------------------------


def blocks_of(fd: int, size: int, node: str, path: str, *, allowed: int = 0) -> BlockMap:
    """Where the file lies on the device of `node`. Raises what `check_extents` raises."""
    try:
        found = list(fiemap.extents(fd, 0, size, flags=fiemap.FIEMAP_FLAG_SYNC))
    except OSError as error:
        raise UnsupportedError(f"the file system of {path} does not tell where it lies: {error.strerror}",
                               errno=error.errno or errno.EOPNOTSUPP, hint="name a file on another disk") from error
    with _opened(node) as device:
        blocks = check_extents(found, size, blockdev.size(device), path, allowed=allowed)
    block = os.fstatvfs(fd).f_frsize
    return blocks.cut(-(-size // block) * block)  # what lies behind the end may go to others


def verify(path: str, inode: int, blocks: BlockMap, node: str) -> None:
    """Whether the file still is the one that was pinned, and lies where it did. StateError (EINVAL).

    A clone of it may share its blocks by now: it is the clone that shows what is written to them.
    """
    with _pinned(path, inode, node) as fd:
        if not immutable.file_flags(fd) & immutable.FS_IMMUTABLE_FL:
            raise StateError(f"the protection of {path} was taken off", errno=errno.EINVAL,
                             hint="begin a new series, and leave the file alone while it is in use")
        if blocks_of(fd, blocks.length, node, path, allowed=fiemap.FIEMAP_EXTENT_SHARED).cut(blocks.length) != blocks:
            raise StateError(f"{path} was moved on its device", errno=errno.EINVAL, hint="begin a new series")


def truncate(path: str, inode: int, blocks: BlockMap, node: str) -> None:
    """Cut the file off behind `blocks`, which stay where they are. Whatever OSError this raises, it is pinned after."""
    with _pinned(path, inode, node) as fd:
        immutable.drop_cache(fd)
        immutable.set_immutable(fd, False)
        try:
            with _opened(path, os.O_RDWR) as writable:
                os.ftruncate(writable, blocks.length)
                os.fsync(writable)
        finally:
            immutable.set_immutable(fd, True)
        os.fsync(fd)


def release(path: str, inode: int, head: bytes, size: int, node: str) -> None:
    """Give the file back to the file system: what is read through it from now on is what is on the device.

    `head` is what the file must begin with, `size` the bytes that it keeps. StateError (EIO) if it does not show that;
    it stays pinned then.
    """
    with _pinned(path, inode, node) as fd:
        drop_below(node)
        immutable.drop_cache(fd)
        if os.pread(fd, len(head), 0) != head:
            raise StateError(f"{path} does not show what was written to it", errno=errno.EIO,
                             hint="unmount the file system and mount it again before the file is read")
        immutable.set_immutable(fd, False)
        if os.fstat(fd).st_size > size:
            os.truncate(path, size)
        os.fsync(fd)


def forget(path: str, inode: int, series: tuple[str, int] | None, node: str) -> None:
    """Remove a file that was pinned. NotFoundError if the name leads to another one by now.

    `series`: UUID in hex and number that its header must have; None for one that was not made to the end.
    """
    with _pinned(path, inode, node) as fd:
        if series is not None:
            drop_below(node)
            immutable.drop_cache(fd)
            header = Header.unpack(os.pread(fd, 64, 0), path)
            if (header.uuid.hex(), header.seqid) != tuple(series):
                raise NotFoundError(f"{path} is a COW file of another series by now", errno=errno.ENOENT)
        immutable.set_immutable(fd, False)
        os.unlink(path)
    _sync_directory(path)


@contextlib.contextmanager
def _pinned(path: str, inode: int, node: str) -> Iterator[int]:
    try:
        with _opened(path) as fd:
            info = os.fstat(fd)
            if (info.st_dev, info.st_ino) != (os.stat(node).st_rdev, inode):
                raise NotFoundError(f"{path} is another file by now", errno=errno.ENOENT)
            yield fd
    except FileNotFoundError as error:
        raise NotFoundError(f"the COW file {path} is not there", errno=errno.ENOENT,
                            hint="is its file system mounted?") from error


@contextlib.contextmanager
def _opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def drop_below(node: str) -> None:
    """A loop device without direct I/O has its own file's pages between the file system and us: take them out."""
    with contextlib.suppress(OSError):
        with open(f"/sys/block/{os.path.basename(os.path.realpath(node))}/loop/backing_file") as file:
            backing = file.read().removesuffix("\n")
        with _opened(backing) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _relative(path: str) -> str:
    """The path as seen from its mount point, with a slash in front, as dattobd tells and takes it."""
    top = os.path.dirname(path)
    while not os.path.ismount(top):
        top = os.path.dirname(top)
    return "/" + os.path.relpath(path, top)


def _holders(path: str) -> str:
    return ", ".join(mounts.file_holders(path))


def _write(fd: int, data: memoryview, offset: int) -> None:
    done = os.pwritev(fd, [data], offset)
    if done < len(data):
        files.transfer_rest(os.pwritev, fd, [data], offset, done)


def _sync_directory(path: str) -> None:
    with _opened(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


OPERATIONS: dict[str, Callable[..., None]] = {"verify": verify, "truncate": truncate, "release": release,
                                              "forget": forget}


def serve(channel: Channel, request: Mapping[str, Any], here: Callable[[str, str], bool]) -> None:
    """Do one request. `here(path, node)` tells whether a path lies directly on the file system of the node."""
    try:
        if request["op"] == "create":
            if here(request["path"], request["node"]):
                create(channel, request["path"], request["size"], request["node"], request["in_use"])
            else:
                channel.send(elsewhere=True)
            return
        arguments = {name: value for name, value in request.items() if name != "op"}
        if "blocks" in arguments:
            arguments["blocks"] = BlockMap(tuple((a, b, c) for a, b, c in arguments["blocks"]))
        if "head" in arguments:
            arguments["head"] = bytes.fromhex(arguments["head"])
        OPERATIONS[request["op"]](**arguments)
        channel.send(done=True)
    except EOFError:
        return  # what was begun has been undone
    except StasisError as error:
        channel.send(error=error.as_dict())
    except OSError as error:
        path = request.get("path", "")
        channel.send(error=StasisError(f"{path}: {error.strerror}", errno=error.errno or errno.EIO).as_dict())
