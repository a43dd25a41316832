# SPDX-License-Identifier: Apache-2.0
"""`update-img`: dattobd's tool that brings an image of one snapshot up to the next, with its arguments and messages.

It exits with a positive errno; unlike the module's tool never with 0 after a failure, and with EIO if a block could not
be copied.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from errno import EINVAL, EIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stasis.daemon.client import Client
    from stasis.daemon.model import Tracer
    from stasis.nbd.client import Client as NbdClient

__all__ = ["main"]

USAGE = "usage: update-img <snapshot device> <cow file> <image file>"
_DEVICE = re.compile(r"(?:/dev/)?datto([0-9]+)")


class _Failed(Exception):
    """A message and the exit status that goes with it."""

    def __init__(self, message: str, errno: int, hint: str = "") -> None:
        super().__init__(message)
        self.errno, self.hint = errno or EIO, hint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns 0 or an errno."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 3:
        print(USAGE, file=sys.stderr)
        return EINVAL
    try:
        return _update(*given)
    except _Failed as error:
        print(error, file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return error.errno


def _minor(device: str) -> int:
    match = _DEVICE.fullmatch(device) or _DEVICE.fullmatch(os.path.realpath(device))
    if match is None:
        raise _Failed("snapshot does not appear to be a dattobd snapshot device", EINVAL,
                      f"{device} is not /dev/dattoN")
    return int(match[1])


def _update(device: str, cow: str, image: str) -> int:
    from stasis.datto.cowreader import CowReader
    from stasis.datto.update import check_follows, update
    from stasis.errors import StasisError

    minor = _minor(device)
    with ExitStack() as stack:
        client = stack.enter_context(_connect())
        tracer = _info(client, minor)
        source = _open_snapshot(client, minor, stack)
        try:
            reader = stack.enter_context(CowReader(cow, source.size))
        except (StasisError, OSError) as error:
            raise _cow_failure(error) from error
        target = _open_image(image, source.size, stack)
        try:
            check_follows(reader, tracer.uuid, tracer.seqid)
        except StasisError as error:
            raise _Failed(str(error), error.errno, error.hint) from error
        print(f"snapshot is {reader.geometry.blocks} blocks large\ncopying blocks", flush=True)
        try:
            result = update(source, reader, target, _progress())
        except OSError as error:
            raise _Failed(f"error writing data block to output image: {error.strerror}", error.errno or EIO) from error
    print(f"copying complete: {result.changed} blocks changed, {result.errors} errors")
    if result.errors:
        raise _Failed("error copying sector to output image: the image is not up to date", EIO)
    return 0


def _connect() -> Client:
    from stasis.daemon.client import connect
    from stasis.errors import StasisError

    try:
        return connect(start_daemon=False)
    except StasisError as error:
        raise _Failed(f"error reading dattobd info from driver: {error}", error.errno, error.hint) from error


def _info(client: Client, minor: int) -> Tracer:
    from stasis.errors import StasisError

    try:
        tracer = client.datto_info(minor)
    except StasisError as error:
        raise _Failed(f"error reading dattobd info from driver: {error}", error.errno, error.hint) from error
    if tracer.error or tracer.state_name != "active snapshot":
        raise _Failed(f"error opening snapshot: tracer {minor} is {tracer.state_name}, error {tracer.error}",
                      -tracer.error or EINVAL, tracer.reason)
    return tracer


def _open_snapshot(client: Client, minor: int, stack: ExitStack) -> NbdClient:
    from stasis.nbd.client import Client as Nbd
    from stasis.nbd.uri import NbdUri

    name = f"datto{minor}"
    try:
        address = NbdUri(export=name, socket=str(client.directories.nbd_socket(name)))
        return stack.enter_context(Nbd.connect(address, timeout=600.0))
    except OSError as error:
        raise _Failed(f"error opening snapshot: {error.strerror or error}", error.errno or EIO) from error


def _cow_failure(error: Exception) -> _Failed:
    from stasis.errors import DamagedError, StateError

    number = getattr(error, "errno", 0) or EIO
    text, hint = str(error), str(getattr(error, "hint", ""))
    if isinstance(error, StateError):
        what = "invalid magic number from cow file" if "no COW file" in text else "error reading mappings into memory"
        return _Failed(f"{what}: {text}", EINVAL, hint)
    if isinstance(error, DamagedError):
        return _Failed(f"error reading cow header: {text}", number, hint)
    return _Failed(f"error opening cow file: {text}", number, hint)


def _open_image(path: str, size: int, stack: ExitStack) -> int:
    """The image must be there and hold the snapshot: it is neither made nor made longer."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _Failed(f"error opening image: {path}: {error.strerror}", error.errno or EIO) from error
    stack.callback(os.close, fd)
    length = os.lseek(fd, 0, os.SEEK_END)
    if length < size or not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
        raise _Failed(f"error opening image: {path} has {length} bytes, the snapshot {size}", EINVAL,
                      "it must be a copy of the snapshot before")
    return fd


def _progress() -> Callable[[int, int], None]:
    """A line that is written over, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done} of {total} blocks ({100 * done // total} %)", end=end, file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
