# SPDX-License-Identifier: Apache-2.0
"""What a difference storage may be made of, how it is opened, and what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Sequence
from errno import EACCES, EBUSY, EINVAL, ENOSPC, EOPNOTSUPP, EPERM

from stasis.block.settings import PART_SIZE
from stasis.errors import BusyError, NotFoundError, PermissionDeniedError, StorageError
from stasis.linux import blockdev, files, mounts

KIND_FILE, KIND_UNNAMED, KIND_DEVICE, KIND_MEMORY = range(4)
KIND_NAMES = ("file", "directory", "device", "memory")


HIGHEST_SIZE = (1 << 31) * PART_SIZE


def refuse_origins(fd: int, origins: Sequence[os.stat_result], name: str) -> None:
    """StorageError if the storage is an origin of the snapshot, or lies on one."""
    info = os.fstat(fd)
    for origin in origins:
        if stat.S_ISBLK(origin.st_mode):
            mine = info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev
            if mine in (origin.st_rdev, *mounts.relatives(origin.st_rdev)):
                raise StorageError(
                    f"{name} lies on a device of the snapshot",
                    errno=EBUSY,
                    hint="name a storage on another disk, or --storage memory",
                )
        elif (info.st_dev, info.st_ino) == (origin.st_dev, origin.st_ino):
            raise StorageError(
                f"{name} is a device of the snapshot itself", errno=EBUSY, hint="name another file or directory"
            )


def open_backing(target: str | int, limit: int | None) -> tuple[int, int, bool]:
    """(descriptor, kind, whether a named file was made)."""
    if isinstance(target, int):
        return _adopt(target)
    if target == "memory":
        return os.memfd_create("stasis-diff", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), KIND_MEMORY, False
    try:
        mode = os.stat(target).st_mode
        if stat.S_ISDIR(mode):
            return files.open_unnamed(target), KIND_UNNAMED, False
        if stat.S_ISBLK(mode):
            return _open_device(target), KIND_DEVICE, False
        if stat.S_ISREG(mode):
            return _open_file(target, 0), KIND_FILE, False
    except FileNotFoundError:
        return _make_file(target), KIND_FILE, True
    except PermissionError as error:
        raise PermissionDeniedError(f"{target} cannot be opened for writing", hint="run as its owner") from error
    except OSError as error:
        raise StorageError(f"{target} cannot be used: {error.strerror}", errno=error.errno or 0) from error
    raise StorageError(
        f"{target} is no file, directory or block device", errno=EINVAL, hint="name one of these, or --storage memory"
    )


def _adopt(fd: int) -> tuple[int, int, bool]:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise StorageError("the descriptor is no file or block device", errno=EINVAL)
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise StorageError("the descriptor is not open for reading and writing", errno=EINVAL)
    return os.dup(fd), KIND_DEVICE if stat.S_ISBLK(mode) else KIND_FILE, False


def _open_device(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != EBUSY:
            raise
        holders = ", ".join(mounts.holders_of(os.stat(path).st_rdev)) or "another program"
        raise BusyError(f"{path} is in use by {holders}", hint="name a device that nobody uses") from error


def _make_file(path: str) -> int:
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise NotFoundError(f"{path} does not exist", hint="name a directory, a file, a block device or 'memory'")
    try:
        return _open_file(path, os.O_CREAT | os.O_EXCL)
    except PermissionError as error:
        raise PermissionDeniedError(f"{path} cannot be made", hint="choose a directory you may write to") from error


def _open_file(path: str, flags: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(fd, 0o600)
    except OSError as error:
        os.close(fd)
        if error.errno in (EACCES, EPERM):
            raise
        raise BusyError(f"{path} is in use by another program", hint="name another file") from error
    return fd


def remove(path: str) -> None:
    """Unlink a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def capacity_of(fd: int, kind: int) -> int:
    """Bytes that a backing has now."""
    return blockdev.size(fd) if kind == KIND_DEVICE else os.fstat(fd).st_size


def settle_limit(fd: int, kind: int, capacity: int, limit: int | None, name: str) -> int:
    """The limit in bytes, a multiple of the part size. StorageError if the backing is larger or too small."""
    if kind == KIND_DEVICE:
        limit = min(capacity, limit or capacity)
    elif limit is None:
        limit = max(capacity, _free(fd, kind))
    elif capacity > limit:
        raise StorageError(
            f"{name} has {capacity} bytes already, more than the limit of {limit}",
            errno=ENOSPC,
            hint="raise --limit or name an empty file",
        )
    limit = min(limit, HIGHEST_SIZE) // PART_SIZE * PART_SIZE
    if limit < 16 * PART_SIZE:
        raise StorageError(
            f"{name} is too small for difference storage",
            errno=ENOSPC,
            hint="give it room for what will be overwritten while the snapshot is held",
        )
    return limit


def _free(fd: int, kind: int) -> int:
    if kind == KIND_MEMORY:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    space = os.fstatvfs(fd)
    return os.fstat(fd).st_size + space.f_bavail * space.f_frsize


def first_portion(fd: int, kind: int, capacity: int, limit: int, portion: int, name: str) -> int:
    """Bytes usable from the start: what the backing has, or the first portion, allocated now."""
    if kind == KIND_DEVICE:
        return limit
    first = min(max(capacity, portion), limit) // PART_SIZE * PART_SIZE
    try:
        files.allocate(fd, 0, first)
    except OSError as error:
        if error.errno == EOPNOTSUPP:
            raise StorageError(
                f"the file system of {name} cannot reserve space (no fallocate)",
                errno=EOPNOTSUPP,
                hint="use another file system, a block device, or --storage memory",
            ) from error
        raise StorageError(
            f"{name} cannot hold {first} bytes: {error.strerror}",
            errno=error.errno or 0,
            hint="name a storage with more free space",
        ) from error
    if kind == KIND_MEMORY:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return first
