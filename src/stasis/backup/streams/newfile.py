# SPDX-License-Identifier: Apache-2.0
"""A file that has its name when it is complete and durable, and not before.

It is written as `.NAME.part` beside it. What a killed command left there is written over by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stasis.block.copy.target import refuse_device_folder
from stasis.errors import BusyError, StasisError, StorageError

__all__ = ["failure", "new_file"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def failure(message: str, error: OSError | None) -> StasisError:
    """What to tell of an error: one of its own kind for a disk that is full."""
    code = (error.errno if error else None) or 0
    if code in FULL:
        return StorageError(message, hint="make room there, or choose another place", errno=code)
    return StasisError(message, errno=code)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[int, Path]]:
    """A descriptor and the path of an empty file that becomes `path` when the block ends well.

    Raises BusyError when `path` exists or somebody else writes it, NotFoundError in /dev, StorageError on a full disk,
    else StasisError.
    """
    if path.exists():
        raise BusyError(f"{path} exists", hint="name a file that does not exist yet")
    refuse_device_folder(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with contextlib.ExitStack() as stack:
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            _lock(fd, part, path)
            stack.callback(os.unlink, part)
            os.ftruncate(fd, 0)
            yield fd, part
            os.fsync(fd)
            os.link(part, path)  # unlike rename, this replaces nothing
            _sync_folder(path.parent)
    except OSError as error:
        raise failure(f"{path} cannot be written: {error.strerror}", error) from error


def _lock(fd: int, part: Path, path: Path) -> None:
    busy = BusyError(f"{path} is being written by another command", hint="wait for it, or choose another name")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    if not part.exists() or part.stat().st_ino != os.fstat(fd).st_ino:  # the other one ended just now
        raise busy


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
