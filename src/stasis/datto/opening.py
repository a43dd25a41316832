# SPDX-License-Identifier: Apache-2.0
"""Making a COW file, and taking up one that is there: what is checked, in dattobd's order, before anything is written.

The errnos are those of the module's tables; docs/guide/datto.md lists them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from typing import Protocol

from stasis.datto.cowfile import CowFile
from stasis.datto.layout import BLOCK_SHIFT, BLOCK_SIZE, FLAG_VMALLOC_UPPER, Geometry, Header, default_size
from stasis.datto.scan import Census, census
from stasis.errors import BusyError, DamagedError, NotFoundError, StateError, StorageError, UsageError
from stasis.linux import files

__all__ = [
    "FileSource",
    "Source",
    "check_census",
    "check_place",
    "create",
    "open_existing",
    "read_header",
    "reopen",
]

Range = tuple[int, int]
"""Offset and length in bytes."""


# -- making one ---------------------------------------------------------------------------------------


def create(path: str, device_size: int, *, uuid: bytes, seqid: int, size: int, cache: int) -> CowFile:
    """A new COW file at `path`, `size` bytes of it allocated (0: a tenth of the device), its header durable.

    It takes the place of an empty file or of another COW file that nobody uses, and of nothing else. Raises UsageError
    (EISDIR, EINVAL), NotFoundError (ENOENT), StateError (EEXIST), BusyError (EBUSY) or StorageError with the errno
    of fallocate; nothing is left behind then, and what was at `path` is still there.
    """
    path = os.path.realpath(path)
    check_place(path)
    geometry = Geometry(device_size)
    header = Header(0, geometry.first_slot, max(size or default_size(device_size), geometry.data_offset), seqid, uuid)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.new")
    fd = _open_new(temporary, path)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        undo.callback(_unlink, temporary)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _allocate(fd, header.fsize, path)
        cow = CowFile(path, fd, geometry, header, cache, fresh=True)
        cow.write_header()
        os.fsync(fd)
        os.replace(temporary, path)
        _sync_directory(path)
        undo.pop_all()
    return cow


def check_place(path: str) -> None:
    """Whether a new file may take this name. Raises what `create` raises."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.isdir(os.path.dirname(path)):
            return
        raise NotFoundError(f"the directory of {path} does not exist", hint="make it first") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be used: {error.strerror}", errno=error.errno or errno.EINVAL) from error
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a directory", errno=errno.EISDIR, hint="name the COW file itself")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is no regular file", errno=errno.EINVAL, hint="name a new file")
    _check_replaceable(path)


def _check_replaceable(path: str) -> None:
    """A file that is there may go if it is empty or an old COW file, and nobody uses it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_size:
            Header.unpack(os.pread(fd, 64, 0), path)
    except BlockingIOError as error:
        raise BusyError(f"{path} is in use as a COW file", errno=errno.EBUSY,
                        hint="each file of a series needs a name of its own") from error
    except (StateError, DamagedError) as error:
        raise StateError(f"{path} exists and is no COW file", errno=errno.EEXIST,
                         hint="name a new file; nothing but an old COW file is replaced") from error
    finally:
        os.close(fd)


def _open_new(temporary: str, path: str) -> int:
    try:
        return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}", errno=error.errno or errno.EIO,
                           hint="name a place you may write to") from error


def _allocate(fd: int, size: int, path: str) -> None:
    try:
        files.allocate(fd, 0, size)
    except OSError as error:
        raise StorageError(f"{path} cannot have {size} bytes: {error.strerror}", errno=error.errno or errno.EIO,
                           hint="-f MIB asks for less; it must hold the index and what will be overwritten") from error


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- taking one up ------------------------------------------------------------------------------------


class Source(Protocol):
    """A COW file that is there: `path` is its name."""

    path: str

    def open(self) -> int:
        """A descriptor that shows at least header and index, and the size."""
        ...

    def build(self, fd: int, geometry: Geometry, header: Header, cache: int) -> CowFile:
        """The file, to be written; `fd` becomes its own, or is closed."""
        ...


class FileSource:
    """A file of some file system."""

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self) -> int:
        """See `open_existing`."""
        return open_existing(self.path)

    def build(self, fd: int, geometry: Geometry, header: Header, cache: int) -> CowFile:
        """See `Source`."""
        return CowFile(self.path, fd, geometry, header, cache, fresh=False)


def reopen(source: Source | str, device_size: int, *, index_only: bool, cache: int, unclean: bool = False,
           suspects: Iterable[Range] = ()) -> CowFile:
    """Take up a file that was left clean, and clear its clean flag.

    With `unclean` it may also be one that was not, because whoever calls knows that every entry which the file
    lacks lies in `suspects` (offset, length in bytes of the device): all blocks there count as changed, which only a
    file without contents can say, so `suspects` of another make it one. Raises NotFoundError, DamagedError (EIO),
    BusyError, or StateError (EINVAL) for a wrong magic, an unclean file, the other mode, or an index that cannot be
    the device's; the file is untouched then.
    """
    source = FileSource(source) if isinstance(source, str) else source
    fd, path = source.open(), source.path
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        header = read_header(fd, path)
        _check_mode(header, path, index_only, unclean)
        geometry = Geometry(device_size)
        _check_lengths(fd, header, geometry, path, with_data=header.is_clean or not index_only)
        counted = census(fd, geometry)
        if not header.is_clean:
            _amend(header, counted, geometry)
        check_census(header, counted, geometry, path)
        header.flags &= ~FLAG_VMALLOC_UPPER
        undo.pop_all()
        cow = source.build(fd, geometry, header, cache)
        undo.callback(cow.close)
        if index_only and not header.is_index_only:
            cow.become_index_only()
        cow.write_header()
        for offset, length in suspects:
            _suspect(cow, offset, length)
        cow.sync()
        undo.pop_all()
    return cow


def open_existing(path: str) -> int:
    """A descriptor of a COW file that nobody else uses. NotFoundError, UsageError, or BusyError (EBUSY)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotFoundError(f"the COW file {path} is not there", errno=errno.ENOENT) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}", errno=error.errno or errno.EINVAL) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise BusyError(f"{path} is in use as a COW file", errno=errno.EBUSY) from None
    return fd


def read_header(fd: int, path: str) -> Header:
    """The header of an open file. DamagedError (EIO) or StateError (EINVAL)."""
    return Header.unpack(os.pread(fd, 64, 0), path)


def _check_mode(header: Header, path: str, index_only: bool, unclean: bool) -> None:
    if not header.is_clean and not unclean:
        raise StateError(f"{path} was not left in order", errno=errno.EINVAL,
                         hint="what it lacks is not known; begin a new series with setup-snapshot")
    if header.is_index_only != index_only and (header.is_clean or header.is_index_only):
        kind = "an incremental" if header.is_index_only else "a snapshot's"
        verb = "reload-incremental" if header.is_index_only else "reload-snapshot"
        raise StateError(f"{path} is {kind} COW file", errno=errno.EINVAL, hint=f"use {verb}")


def _check_lengths(fd: int, header: Header, geometry: Geometry, path: str, *, with_data: bool) -> None:
    """After a power cut the data may have been cut off before the header that says so reached the disk."""
    size = os.fstat(fd).st_size
    if size < geometry.data_offset:
        raise _other_device(path, f"its index would need {geometry.data_offset} bytes and it has {size}")
    end = header.fpos << BLOCK_SHIFT
    has_data = with_data and not header.is_index_only
    if header.fpos < geometry.first_slot or (has_data and end >= size + BLOCK_SIZE):
        raise _other_device(path, f"its data cannot end at {end}")


def check_census(header: Header, counted: Census, geometry: Geometry, path: str) -> None:
    """Whether index and header can belong together and to the device. StateError (EINVAL)."""
    if counted.pointing and (counted.lowest < geometry.first_slot or counted.highest >= header.fpos):
        raise _other_device(path, "entries of its index point outside its data")
    is_whole = header.is_clean and not header.is_index_only
    if is_whole and counted.pointing != header.fpos - geometry.first_slot:
        raise _other_device(path, "its index does not point at all of its data")
    if header.version and counted.changed != header.changed_blocks:
        raise _other_device(path, f"it has {counted.changed} entries, its header says {header.changed_blocks}")


def _other_device(path: str, reason: str) -> StateError:
    return StateError(f"{path} is damaged, or of a device of another size: {reason}", errno=errno.EINVAL,
                      hint="begin a new series with setup-snapshot")


def _amend(header: Header, counted: Census, geometry: Geometry) -> None:
    """Of a file that was not closed the header is old: the index, which was written at once, knows better."""
    header.fpos = max(header.fpos if header.is_index_only else geometry.first_slot, counted.highest + 1)
    if header.version:
        header.changed_blocks = counted.changed


def _suspect(cow: CowFile, offset: int, length: int) -> None:
    for start, end in cow.territory.outside(offset, min(offset + length, cow.geometry.size)):
        for first, stop in cow.index.runs_without(start >> BLOCK_SHIFT, -(-end >> BLOCK_SHIFT)):
            cow.mark(first, stop)
