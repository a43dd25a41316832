# SPDX-License-Identifier: Apache-2.0
"""`update-img`: dattobd's tool that brings an image of one snapshot up to the next, with its arguments and messages.

The image may also be a repository (`update_repository`). It exits with a positive errno; unlike the module's tool never
with 0 after a failure, and with EIO if a block could not be copied.
"""

from __future__ import annotations

import os
import stat
import sys
from errno import EINVAL, EIO

TYPE_CHECKING = False  # half of what this takes with little to copy is the time until it has started
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stasis.daemon.model import Tracer
    from stasis.datto.cowreader import CowReader
    from stasis.datto.pointfile import PointFile
    from stasis.nbd.bulkread import BulkReader

__all__ = ["main"]

USAGE = "usage: update-img <snapshot device> <cow file> <image file>"


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
    for path in (device, os.path.realpath(device)):
        number = path.removeprefix("/dev/").removeprefix("datto")
        if path in (f"datto{number}", f"/dev/datto{number}") and number.isdecimal():
            return int(number)
    raise _Failed("snapshot does not appear to be a dattobd snapshot device", EINVAL, f"{device} is not /dev/dattoN")


def _update(device: str, cow: str, image: str) -> int:
    from stasis.cli.update_repository import is_repository
    from stasis.datto.cowreader import CowReader
    from stasis.datto.update import check_follows

    minor = _minor(device)
    source, uuid, seqid = _open_snapshot(minor)
    with source:
        try:
            reader = CowReader(cow, source.size)
        except _failures() as error:
            raise _cow_failure(error) from error
        with reader:
            if is_repository(image):
                return _back_up(minor, reader, (uuid, seqid), image)
            target = _open_image(image, source.size)
            try:
                check_follows(reader, uuid, seqid)
                return _copy(source, reader, target)
            except _failures() as error:
                raise _Failed(str(error), getattr(error, "errno", 0), getattr(error, "hint", "")) from error
            finally:
                os.close(target)


def _failures() -> tuple[type[Exception], ...]:
    """What may go wrong. Asked for when something has: success does not load it."""
    from stasis.errors import StasisError

    return StasisError, OSError


def _copy(source: BulkReader | PointFile, reader: CowReader, target: int) -> int:
    from stasis.datto.update import update

    print(f"snapshot is {reader.geometry.blocks} blocks large\ncopying blocks", flush=True)
    try:
        result = update(source, reader, target, _progress())
    except OSError as error:
        raise _Failed(f"error writing data block to output image: {error.strerror}", error.errno or EIO) from error
    print(f"copying complete: {result.changed} blocks changed, {result.errors} errors")
    if result.errors:
        raise _Failed("error copying sector to output image: the image is not up to date", EIO)
    return 0


def _back_up(minor: int, reader: CowReader, place: tuple[str, int], url: str) -> int:
    from stasis.cli.update_repository import update_repository
    from stasis.datto.update import check_follows

    try:
        check_follows(reader, *place)
        print(f"snapshot is {reader.geometry.blocks} blocks large\ncopying blocks", flush=True)
        update_repository(minor, url)
    except _failures() as error:
        raise _Failed(str(error), getattr(error, "errno", 0), getattr(error, "hint", "")) from error
    print(f"copying complete: {sum(end - first for first, end in reader.changed())} blocks changed, 0 errors")
    return 0


def _open_snapshot(minor: int) -> tuple[BulkReader | PointFile, str, int]:
    """The snapshot's export, and its place in its series."""
    from stasis.daemon import rundir
    from stasis.datto.update import place_in_series
    from stasis.nbd.bulkread import BulkReader

    name = f"datto{minor}"
    try:
        source = BulkReader(rundir.nbd_socket(rundir.resolve(), name), name, timeout=600.0)
    except OSError as error:
        tracer = _explain(minor)
        if tracer.live:
            return _open_point(tracer.point), tracer.uuid, tracer.seqid
        raise _Failed(f"error opening snapshot: {error.strerror or error}", error.errno or EIO) from error
    place = place_in_series(source.description)
    if place is None:
        tracer = _explain(minor)
        place = tracer.uuid, tracer.seqid
    return source, *place


def _open_point(path: str) -> PointFile:
    """What is kept of the snapshot of a device in use."""
    from stasis.datto.pointfile import PointFile

    try:
        return PointFile(path)
    except OSError as error:
        raise _Failed(f"error opening snapshot: {path}: {error.strerror}", error.errno or EIO) from error


def _explain(minor: int) -> Tracer:
    """What the daemon says of a tracer; _Failed says why it has no snapshot."""
    from stasis.daemon.client import connect
    from stasis.errors import StasisError

    try:
        with connect(start_daemon=False) as client:
            tracer = client.datto_info(minor)
    except StasisError as error:
        raise _Failed(f"error reading dattobd info from driver: {error}", error.errno, error.hint) from error
    if tracer.error or tracer.state_name != "active snapshot":
        raise _Failed(f"error opening snapshot: tracer {minor} is {tracer.state_name}, error {tracer.error}",
                      -tracer.error or EINVAL, tracer.reason)
    return tracer


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


def _open_image(path: str, size: int) -> int:
    """The image must be there and hold the snapshot: it is neither made nor made longer."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _Failed(f"error opening image: {path}: {error.strerror}", error.errno or EIO) from error
    length, mode = os.lseek(fd, 0, os.SEEK_END), os.fstat(fd).st_mode
    if length < size or not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
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
