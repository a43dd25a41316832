# SPDX-License-Identifier: Apache-2.0
"""Opening an origin: exclusively, and refusing by name what somebody else uses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Sequence
from errno import EACCES, EBUSY, EINVAL, ENODEV, ENXIO, EPERM

from stasis.block.origin import Origin, file_alignment
from stasis.errors import BusyError, NotFoundError, PermissionDeniedError, StasisError, UsageError
from stasis.linux import blockdev, files, mounts
from stasis.linux.iobuffer import IoBuffer


def open_origin(path: str, *, buffered: bool = False) -> Origin:
    """Open a block device (exclusively) or a regular file (locked) as an origin.

    Raises NotFoundError, PermissionDeniedError, UsageError for anything that is neither, and BusyError with
    the holder's name when the device is mounted or held by somebody else.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist", hint="name a block device or an image file") from error
    except PermissionError as error:
        raise _denied(path) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be used: {error.strerror}", errno=error.errno or EINVAL) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(
            f"{path} is neither a block device nor a regular file",
            errno=EINVAL,
            hint="name a disk, a partition or an image file",
        )
    with contextlib.ExitStack() as undo:
        fd = _open_device(path) if stat.S_ISBLK(mode) else _open_file(path)
        undo.callback(os.close, fd)
        direct = None if buffered else _direct(fd, path)
        if direct is not None:
            undo.callback(os.close, direct)
        origin = Origin(os.path.abspath(path), fd if direct is None else direct, None if direct is None else fd)
        undo.pop_all()
    if not origin.size:
        origin.close()
        raise UsageError(f"{path} is empty", errno=EINVAL, hint="an origin has at least one byte")
    return origin


def _open_device(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == EBUSY:
            raise _busy(path, mounts.holders_of(os.stat(path).st_rdev)) from error
        raise _translated(path, error) from error
    # An exclusive open of a whole disk does not see that one of its partitions is in use.
    number = os.fstat(fd).st_rdev
    used = [
        holder
        for relative in mounts.relatives(number)
        for holder in mounts.holders_of(relative)
        if "mounted" in holder and "read-only" not in holder
    ]
    if used:
        os.close(fd)
        raise _busy(path, used)
    return fd


def _open_file(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _translated(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holders = [holder for holder in mounts.file_holders(path) if holder.startswith(("backing", "used as swap"))]
        if holders:
            raise _busy(path, holders)
    except OSError as error:
        os.close(fd)
        raise _busy(path, mounts.file_holders(path)) from error
    except StasisError:
        os.close(fd)
        raise
    return fd


def _direct(fd: int, path: str) -> int | None:
    """A second descriptor for direct I/O, or None where the origin does not allow it."""
    try:
        direct = files.reopen(fd, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return None
    sector = blockdev.logical_block_size(fd) if blockdev.is_block_device(fd) else file_alignment(direct)
    with IoBuffer(sector) as buffer:
        try:
            os.preadv(direct, [buffer.view[:sector]], 0)
        except OSError:
            os.close(direct)
            return None
    return direct


def _busy(path: str, holders: Sequence[str]) -> BusyError:
    return BusyError(
        f"{path} is in use: {', '.join(holders) or 'another program holds it'}",
        hint="unmount or stop what holds it first",
    )


def _denied(path: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"no permission to open {path} for reading and writing", hint="run as root, or as the owner of the image file"
    )


def _translated(path: str, error: OSError) -> StasisError:
    if error.errno in (EACCES, EPERM):
        return _denied(path)
    if error.errno in (ENXIO, ENODEV):
        return NotFoundError(f"the device behind {path} is gone", errno=ENODEV)
    return UsageError(f"{path} cannot be opened: {error.strerror}", errno=error.errno or EINVAL)
