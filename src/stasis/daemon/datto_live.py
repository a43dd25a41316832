# SPDX-License-Identifier: Apache-2.0
"""dattobd's incremental mode on live devices: disks that are mounted and in use and go by no worker of ours.

What changes is in the change map that the kernel's programs keep (stasis.live). A tracer is a mark in that map; its COW
file gets its entries when the series goes on to the next snapshot. That snapshot is an instant, of which only those
blocks are kept that changed before it, in a file beside the COW file: they are all that `update-img` reads.
docs/design/datto.md says why nothing is missed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from errno import EINVAL
from typing import Any

from stasis.block.copy.plan import Extent
from stasis.daemon import child
from stasis.daemon.paths import Directories
from stasis.datto import opening, series
from stasis.datto.cowfile import CowFile
from stasis.datto.layout import BLOCK_SHIFT, CACHE_DEFAULT
from stasis.datto.registry import LIVE, MIB, Registry, TracerRecord
from stasis.errors import BusyError, DaemonError, GenerationError, StasisError, StateError, StorageError

__all__ = ["LiveTracers"]

POINT_SUFFIX = ".point"
GONE = "begin a new series: stasis datto setup --live"

log = logging.getLogger(__name__)


class LiveTracers:
    """The live part of the registry's backend. `lock` is the daemon's; it is not held while a device is copied."""

    def __init__(self, directories: Directories, registry: Registry, lock: threading.RLock) -> None:
        self._directories, self._registry, self._lock = directories, registry, lock
        self._files: dict[int, CowFile] = {}
        self._busy: dict[int, int] = {}
        """Minors whose device is being copied, and the thread that does it."""
        self._next: dict[int, tuple[CowFile, dict[str, Any], str]] = {}
        """By minor, of a transition: the next COW file, its instant, and the file with its blocks."""
        self._running: set[subprocess.Popen[str]] = set()

    def close(self) -> None:
        """End the copies that run; series go on when a daemon begins."""
        for running in list(self._running):
            running.terminate()
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def owns(self, minor: int) -> bool:
        """Whether this minor is that of a live device."""
        record = self._registry.tracers.get(minor)
        return record is not None and record.mark is not None

    # -- the calls ----------------------------------------------------------------------------------------

    def setup(self, minor: int, bdev: str, cow: str, image: str) -> TracerRecord:
        """Begin a series in incremental mode: `image`, a new file, gets the device as it is at this instant.

        Raises what setup_snapshot raises, and BusyError if the device is written faster than it is copied.
        """
        with self._alone(minor):
            with self._lock:
                self._registry.new_live(minor, bdev, cow)
            series.refuse_origin(cow, os.stat(bdev))
            file = opening.create(cow, _size_of(bdev), uuid=os.urandom(16), seqid=1, size=1,
                                  cache=CACHE_DEFAULT)
            with _removed_on_failure(file), _new_file(image):
                file.become_index_only()
                instant = self._copy(bdev, image, None, [file.path])
                _check_size(file, instant)
                with self._lock:
                    record = self._registry.new_live(minor, bdev, cow)
                    self._files[minor] = file
                    record.mark = _mark(instant)
                    record.taken = time.time()
                    record.take(self._describe(record))
                    self._registry.enter(record)
        return record

    def transition_snapshot(self, minor: int, cow: str, fallocated: int) -> TracerRecord:
        """The next snapshot: its instant is taken, its blocks are kept, the COW file before is finished."""
        with self._alone(minor):
            with self._lock:
                record, _, size = self._registry.check_snapshot(minor, cow, fallocated)
                old, mark = self._files[minor], record.mark
            series.refuse_origin(cow, os.stat(record.bdev))
            file = opening.create(cow, old.geometry.size, uuid=old.header.uuid, seqid=old.header.seqid + 1,
                                  size=size or record.fallocated * MIB or 1, cache=record.cache_size)
            point = file.path + POINT_SUFFIX
            with _removed_on_failure(file), _new_file(point, replace=True):
                instant = self._copy(record.bdev, point, mark, [file.path, old.path])
                _check_size(file, instant)
                _finish(old, instant["extents"])
                with self._lock:
                    self._next[minor] = file, instant, point
                    return self._registry.transition_snapshot(minor, cow, fallocated)

    @contextlib.contextmanager
    def _alone(self, minor: int) -> Iterator[None]:
        with self._lock:
            if minor in self._busy:
                raise BusyError(f"the device of minor {minor} is being copied", hint="wait until that is done")
            self._busy[minor] = threading.get_ident()
        try:
            yield
        finally:
            with self._lock:
                del self._busy[minor]
                self._next.pop(minor, None)

    def _copy(self, device: str, target: str, since: tuple[str, int] | None, others: Sequence[str]) -> dict[str, Any]:
        """Take an instant in a process of its own, because it freezes file systems and locks memory."""
        wanted = {"device": device, "state": str(self._directories.state), "target": target, "since": since,
                  "others": list(others)}
        running = subprocess.Popen([sys.executable, "-m", "stasis.live.point"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, env=child.environment(), start_new_session=True)
        self._running.add(running)
        try:
            out, _ = running.communicate(json.dumps(wanted))
        finally:
            self._running.discard(running)
        if running.returncode:
            raise DaemonError(f"the copy of {device} ended early, with status {running.returncode}",
                              hint="daemon.log has more; no change is lost")
        answer: dict[str, Any] = json.loads(out)
        if "error" in answer:
            raise StasisError.from_dict(answer["error"])
        for warning in answer["point"]["warnings"]:
            log.warning("%s: %s", device, warning)
        instant: dict[str, Any] = answer["point"]
        return instant

    # -- what the registry asks ---------------------------------------------------------------------------

    def ask(self, device: str, request: str, **fields: Any) -> dict[str, Any]:
        """As a worker answers. StateError (EINVAL) for what needs old contents."""
        minor = int(device.removeprefix(LIVE))
        record = self._registry.tracers[minor]
        handler: Callable[..., None] | None = getattr(self, f"_do_{request}", None)
        if handler is None:
            raise StateError(f"tracer {minor} is of a live device and keeps no old contents", errno=EINVAL)
        if minor not in self._files and request not in ("info", "drop"):
            raise BusyError(f"the COW file of tracer {minor} is not open", hint="the daemon is ending; try again")
        handler(record, **fields)
        return self._describe(record)

    def _describe(self, record: TracerRecord) -> dict[str, Any]:
        """What is known of a tracer, as `Hosted.describe` says it of a served device's."""
        is_open = self._busy.get(record.minor, threading.get_ident()) != threading.get_ident()
        fields: dict[str, Any] = {"minor": record.minor, "open": int(is_open), "error": 0}
        file = self._files.get(record.minor)
        if file is None:
            return fields
        header = file.header
        fields |= {"mode": "incremental" if header.is_index_only else "snapshot", "cow": file.path,
                   "cow_size": header.fsize, "seqid": header.seqid, "uuid": header.uuid.hex(),
                   "version": header.version, "filled": 0}
        try:
            fields["changed"] = sum(_blocks(extent)[1] - _blocks(extent)[0] for extent in self._changed(record))
        except StasisError as error:
            fields |= {"error": -EINVAL, "reason": f"{error.message}; {GONE}"}
        return fields

    def _changed(self, record: TracerRecord) -> list[Extent]:
        """What changed since the snapshot, up to now. GenerationError and others if that is not known."""
        from stasis.live import devicefile, tracker

        assert record.mark is not None
        files = devicefile.DeviceFile(self._directories.state, devicefile.find(self._directories.state, record.bdev))
        with tracker.Tracker(files, None) as found:
            if not found.record.this_boot:
                raise _NotYetError(f"the tracking of {record.bdev} was not taken up after the boot",
                                   hint="stasis track resume")
            return found.changed_since(tracker.Mark(*record.mark))

    def _do_info(self, record: TracerRecord) -> None:
        """Nothing to do but to describe it."""

    def _do_snapshot(self, record: TracerRecord, cow: str, size: int) -> None:
        """What transition_snapshot has made ready takes effect."""
        file, instant, point = self._next.pop(record.minor)
        assert (file.path, file.header.fsize >= size) == (os.path.realpath(cow), True)
        self._files[record.minor].close()
        self._files[record.minor] = file
        record.mark, record.point = _mark(instant), point

    def _do_incremental(self, record: TracerRecord) -> None:
        """The blocks of the snapshot go."""
        self._files[record.minor].become_index_only()
        self._forget_point(record)

    def _do_cache(self, record: TracerRecord, cache: int) -> None:
        self._files[record.minor].index.set_cache(cache)

    def _do_drop(self, record: TracerRecord) -> None:
        """The series ends. The device is tracked on: backups may need it."""
        self._forget_point(record)
        file = self._files.pop(record.minor, None)
        if file is not None:
            file.unlink()
            file.close()

    def _forget_point(self, record: TracerRecord) -> None:
        if record.point:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(record.point)
            record.point = ""

    # -- after a restart ----------------------------------------------------------------------------------

    def wake(self) -> None:
        """Go on with the series of the daemon before, as soon as the change map of each is taken up."""
        for record in self._registry.tracers.values():
            if record.mark is not None and record.state.is_unverified and not record.error:
                record.device = f"{LIVE}{record.minor}"
                try:
                    self._take_up(record)
                except (_NotYetError, BusyError):
                    continue  # the daemon before may still be ending
                except (StasisError, OSError) as error:
                    record.error, record.reason = -EINVAL, f"{error}; {GONE}"
                    log.warning("tracer %d of %s cannot go on: %s", record.minor, record.bdev, error)
                self._registry.woke(record, self._describe(record))

    def _take_up(self, record: TracerRecord) -> None:
        self._changed(record)
        with open(opening.open_existing(record.cow), "rb") as file:
            index_only = opening.read_header(file.fileno(), record.cow).is_index_only
        if not index_only and not os.path.exists(record.point):
            raise GenerationError(f"the blocks of snapshot {record.seqid} of {record.bdev} are gone", hint=GONE)
        # What is entered in the file is true, and the map has all the rest: so it may be unclean.
        self._files[record.minor] = opening.reopen(record.cow, _size_of(record.bdev), index_only=index_only,
                                                   cache=record.cache_size, unclean=True)
        if index_only:
            self._forget_point(record)


class _NotYetError(StateError):
    """The change map may still be taken up."""


def _mark(instant: dict[str, Any]) -> tuple[str, int]:
    return str(instant["mark"]["generation"]), int(instant["mark"]["number"])


def _size_of(path: str) -> int:
    from stasis.linux import blockdev

    with open(path, "rb") as device:
        return blockdev.size(device.fileno())


def _check_size(file: CowFile, instant: dict[str, Any]) -> None:
    if instant["size"] != file.geometry.size:
        raise StorageError(f"the device has {instant['size']} bytes now, and had {file.geometry.size}", hint=GONE)


def _blocks(extent: Sequence[int]) -> tuple[int, int]:
    """First block of 4 KiB, and the one behind the last."""
    return extent[0] >> BLOCK_SHIFT, -(-(extent[0] + extent[1]) >> BLOCK_SHIFT)


def _finish(file: CowFile, extents: Sequence[Sequence[int]]) -> None:
    """Enter what changed, and leave the file complete. Until it is, it is not clean, durably."""
    file.write_header()
    file.sync()
    for extent in extents:
        file.mark(*_blocks(extent))
    file.finish()


@contextlib.contextmanager
def _removed_on_failure(file: CowFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.unlink()
        file.close()
        raise


@contextlib.contextmanager
def _new_file(path: str, *, replace: bool = False) -> Iterator[None]:
    """An empty file that goes again if what follows fails. An existing one is only taken if it is empty."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_TRUNC if replace else 0)
    fd = os.open(path, flags, 0o600)
    size = os.fstat(fd).st_size
    os.close(fd)
    if size:
        raise StateError(f"{path} exists and is not empty", hint="name a new file; nothing is overwritten")
    try:
        yield
    except BaseException:
        os.unlink(path)
        raise


