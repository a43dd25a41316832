# SPDX-License-Identifier: Apache-2.0
"""A COW file and its write-intent log: making the two, taking them up after a stop or a crash, giving them up.

The log is what proves, when a file is taken up, that nothing was written behind its back: it is there from before the
first write that the file sees until the first that it does not, and it names the generation of the device's change map,
which ends when somebody else wrote to the device.
"""

from __future__ import annotations

import os
import uuid as uuids
from collections.abc import Callable
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path

from stasis.block.intentlog import IntentLog
from stasis.block.tracking import Opening, Tracker
from stasis.datto import opening as cow_opening
from stasis.datto.cowfile import CowFile
from stasis.errors import StateError, UsageError
from stasis.linux import mounts

__all__ = ["Site", "forget_log", "forget_logs", "generation_of", "log_path", "make", "refuse_origin", "take_up"]

LOG_PREFIX = "datto-"


@dataclass(frozen=True, slots=True)
class Site:
    """The device a file is for: its size in bytes, the directory of its log, and its change map, if it has one."""

    path: str
    size: int
    directory: Path
    region_shift: int
    tracker: Tracker | None
    opening: Opening | None


def log_path(directory: Path, uuid: bytes, seqid: int) -> Path:
    """The write-intent log of one file of a series."""
    return directory / f"{LOG_PREFIX}{uuid.hex()}-{seqid}"


def generation_of(site: Site) -> bytes:
    """The generation of the device's change map; zeroes without one."""
    return bytes(16) if site.tracker is None else uuids.UUID(site.tracker.changes.generation).bytes


def refuse_origin(path: str, origin: os.stat_result) -> None:
    """UsageError (EINVAL) if a COW file at `path` would lie on the very device that it protects."""
    directory = os.path.dirname(os.path.realpath(path))
    try:
        place = os.stat(directory).st_dev
    except OSError:
        return  # it does not exist, which is said in its turn
    if origin.st_rdev and place in (origin.st_rdev, *mounts.relatives(origin.st_rdev)):
        raise UsageError(f"{path} lies on the device that it is to protect", errno=EINVAL,
                         hint="name a file on another disk; what is written through stasis goes around its mount")


def make(site: Site, path: str, uuid: bytes, seqid: int, size: int, cache: int,
         then: Callable[[], None], cow: CowFile | None = None) -> tuple[CowFile, IntentLog]:
    """A new file of a series, or `cow` if that has been made, and its log, both durable; `then` is done once they are.

    Raises what opening.create raises, or OSError, of `then` too; nothing is left then.
    """
    cow = cow or cow_opening.create(path, site.size, uuid=uuid, seqid=seqid, size=size, cache=cache)
    try:
        log = IntentLog.create(log_path(site.directory, uuid, seqid), site.size, site.region_shift,
                               generation_of(site))
    except OSError:
        cow.unlink()
        cow.close()
        raise
    try:
        log.clear(log.start_clearing())
        then()
    except OSError:
        forget_log(log.path)
        log.close()
        cow.unlink()
        cow.close()
        raise
    return cow, log


def take_up(site: Site, source: cow_opening.Source | str, *, index_only: bool, cache: int) -> tuple[CowFile, IntentLog]:
    """Go on with a file that was closed, or that a crash left and the log covers.

    Raises StateError (EINVAL) if changes may have been missed, and what opening.reopen raises.
    """
    source = cow_opening.FileSource(source) if isinstance(source, str) else source
    path = source.path
    with open(source.open(), "rb") as file:
        header = cow_opening.read_header(file.fileno(), path)
    log = _open_log(site, log_path(site.directory, header.uuid, header.seqid), path)
    try:
        cow = _reopen(site, source, log, header.is_clean, index_only, cache)
    except BaseException:
        log.close()
        raise
    return cow, log


def _open_log(site: Site, path: Path, cow: str) -> IntentLog:
    try:
        log = IntentLog.open(path)
    except FileNotFoundError:
        raise _missed(site, cow, "no record of them was kept") from None
    fresh = site.opening is None or site.opening.fresh
    if fresh or log.generation != generation_of(site) or len(log.regions) << log.shift < site.size:
        log.close()
        raise _missed(site, cow, (site.opening.reason if site.opening else "") or "its change map began anew")
    return log


def _missed(site: Site, cow: str, reason: str) -> StateError:
    return StateError(f"changes to {site.path} may have been missed since {cow} was in use: {reason}", errno=EINVAL,
                      hint="destroy the tracer and begin a new series with setup-snapshot")


def _reopen(site: Site, source: cow_opening.Source, log: IntentLog, is_clean: bool, index_only: bool, cache: int
            ) -> CowFile:
    # Without a break of the machine the page cache has everything that was entered; in incremental mode, though,
    # blocks may have waited for that in the worker that died.
    same_boot = site.opening is not None and site.opening.same_boot
    if is_clean or (same_boot and not index_only):
        return cow_opening.reopen(source, site.size, index_only=index_only, cache=cache, unclean=not is_clean)
    if not index_only:
        raise StateError(f"{source.path} lost old contents when the machine stopped", errno=EINVAL,
                         hint="reload-incremental keeps the series: what changed is known")
    suspects = [(region << log.shift, 1 << log.shift) for region in log.dirty()]
    return cow_opening.reopen(source, site.size, index_only=True, cache=cache, unclean=True, suspects=suspects)


def forget_log(path: Path) -> None:
    """Remove a log durably: from now on its file cannot be taken up. OSError."""
    path.unlink(missing_ok=True)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def forget_logs(directory: Path, keep: Path | None = None) -> None:
    """Remove the logs of all files of a device, but for `keep`: it is going to be written without them. OSError."""
    for path in directory.glob(f"{LOG_PREFIX}*"):
        if path != keep:
            forget_log(path)
