# SPDX-License-Identifier: Apache-2.0
"""Memory that is copied while the tree runs on, so that little is left for when it stands still.

A round stops the tree only to mark its pages; they are read when it runs again. What it writes meanwhile may get into
the set or not: it is written since the mark, so the next set has it.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

from stasis.errors import StasisError
from stasis.linux import procfs
from stasis.linux.procfs import Mapping
from stasis.linux.taskmem import TaskMemory
from stasis.process import keeper
from stasis.process.dump.changes import Changes
from stasis.process.dump.ids import with_memory
from stasis.process.dump.inside import entering, watch_inside
from stasis.process.dump.pages import write_shared
from stasis.process.dump.shared import Known, shared_memory
from stasis.process.dump.tracking import Key, Tracking, ended
from stasis.process.errors import refusal
from stasis.process.guardian import Guardian
from stasis.process.images.imageset import ImageSet
from stasis.process.images.pagemap import PE_PARENT, PE_PRESENT, PagemapWriter
from stasis.process.images.schema.inventory import InventoryEntry
from stasis.process.images.setwriter import ImageSetWriter, staging_for
from stasis.process.journal import Journal
from stasis.process.meter import Meter, Progress
from stasis.process.tree import Tree

__all__ = ["PreDumpResult", "continued", "memory_of", "pre_dump"]

PAGE = 4096
BUFFER = 1 << 20
IMAGE_VERSION = 2
PATIENCE = 1.0
"""Seconds for stopping a tree once more after something failed."""
LITTLE = 256
"""Pages that need no further round."""
SHRINKING = 0.9
"""A round that copies more than this part of the one before gains nothing."""


@dataclass(frozen=True, slots=True)
class PreDumpResult:
    """What a round copied. Pages of 4 KiB; `pages_in_parent`: those that the parent has as they are."""

    images: str
    pids: list[int]
    pages: int
    pages_in_parent: int
    frozen_seconds: float
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class _Plan(NamedTuple):
    """What is to be copied of a task."""

    pid: int
    memory: TaskMemory
    changes: Changes


def pre_dump(
    pid: int, images: str | os.PathLike[str], *, parent: str | os.PathLike[str] | None = None, timeout: float = 10.0,
    progress: Progress | None = None,
) -> PreDumpResult:
    """Copy the memory of a tree to the directory `images` while it runs on, and watch what it writes from then on.

    To be called in a process with one thread. The set is to be continued with `parent=images` by another one, or by
    `dump`, and cannot be restored by itself. Raises UnsupportedError where the kernel cannot watch memory.
    """
    if way := entering(pid):
        path, before = os.path.abspath(images), os.path.abspath(parent) if parent is not None else None
        found = watch_inside(pid, way, lambda inner: _pre_dump(inner, path, before, timeout, progress).as_dict())
        if found is None:
            raise StasisError(f"the pre-dump of process {pid} was killed", hint="nothing was changed")
        return PreDumpResult(**{**found, "images": os.fspath(images)})
    return _pre_dump(pid, images, parent, timeout, progress)


def _pre_dump(
    pid: int, images: str | os.PathLike[str], parent: str | os.PathLike[str] | None, timeout: float,
    progress: Progress | None,
) -> PreDumpResult:
    """From where its pids are ours."""
    root, staging = _root(pid), staging_for(images)
    with (
        Guardian(Journal(), partial(shutil.rmtree, staging, ignore_errors=True)),
        ImageSetWriter(images, staging=staging, meter=Meter(progress)) as out,
        _taken(root, parent) as (tracking, warnings),
    ):
        if tracking.since and parent is not None:
            out.link_parent(parent)
        with _known(pid, parent if tracking.since else None) as known:
            result = copy_round(pid, out, tracking, timeout, warnings, known)
        keeper.give(root, tracking)
    return result


@contextmanager
def continued(
    pid: int, out: ImageSetWriter, parent: str | os.PathLike[str] | None, rounds: int, timeout: float,
    track: bool = False,
) -> Iterator[tuple[Tracking, list[str]]]:
    """For a dump: what is known of the memory from `parent` on, after up to `rounds` rounds of copying into sets
    within the set `out`, which continues the last one. Also what the user should know about it. With `track` a keeper
    that is there gives up what it has."""
    if parent is None and not rounds and not track:
        yield Tracking(), []
        return
    root = _root(pid)
    with _taken(root, parent) as (tracking, warnings):
        last = where = parent if tracking.since else None
        copied = 0
        for number in range(1, rounds + 1):
            with ImageSetWriter(os.path.join(out.staging, f"pre-copy-{number}"), meter=out.meter) as ahead:
                if last is not None:
                    ahead.link_parent(_seen_from(ahead, last, out))
                with _known(pid, where) as known:
                    result = copy_round(pid, ahead, tracking, timeout, [], known)
                where = ahead.path
            last = os.path.join(out.path, f"pre-copy-{number}")
            if result.pages <= LITTLE or (copied and result.pages > SHRINKING * copied):
                break
            copied = result.pages
        if last is not None:
            out.link_parent(last)
        with _known(pid, where) as tracking.shared:
            yield tracking, warnings


@contextmanager
def _known(pid: int, parent: str | os.PathLike[str] | None) -> Iterator[Known | None]:
    """What a set that is to be continued has of the tree's shared memory."""
    if parent is None:
        yield None
        return
    with Known(parent, shared_memory(_tree(pid))) as known:
        yield known


def _tree(pid: int) -> list[int]:
    """The processes of a tree that runs; who comes and goes meanwhile may be missing."""
    found = [pid]
    for one in found:
        with suppress(ProcessLookupError):
            found += [child for tid in procfs.threads(one) for child in procfs.children(one, tid)]
    return found


def _seen_from(ahead: ImageSetWriter, parent: str | os.PathLike[str], out: ImageSetWriter) -> str:
    """A path whose way from a set within the staging directory is that from where the set will be."""
    final = os.path.join(out.path, os.path.basename(ahead.path))
    return os.path.join(ahead.path, os.path.relpath(os.path.abspath(parent), final))


def _root(pid: int) -> Key:
    try:
        return pid, procfs.stat(pid).start_time
    except OSError as error:
        raise refusal(pid, error) from error


@contextmanager
def _taken(root: Key, parent: str | os.PathLike[str] | None) -> Iterator[tuple[Tracking, list[str]]]:
    """What was watched since `parent`; its descriptors are closed at the end, unless they were given away."""
    known = _run_id(parent) if parent is not None else ""
    with closing(keeper.take(root)) as tracking:
        if not known or tracking.since != known:
            tracking.since = ""
            if parent is not None:
                tracking.warnings.append(f"nothing is known of what process {root[0]} wrote since {os.fspath(parent)}: "
                                         "all of its memory is written")  # fmt: skip
        try:
            yield tracking, tracking.warnings
        except BaseException:
            with suppress(StasisError, OSError):  # what went wrong before is told; the next command does this, too
                _withdraw(root[0], tracking)
            raise


def _withdraw(pid: int, tracking: Tracking) -> None:
    """Leave nothing in a tree that nobody is going to watch."""
    if not tracking.canaries:
        return
    journal = Journal()
    with Guardian(journal), Tree(pid, timeout=PATIENCE) as tree:
        tree.freeze()
        for task in with_memory(tree.tasks):
            tracking.withdraw(task, journal)


def _run_id(parent: str | os.PathLike[str]) -> str:
    with ImageSet.open(parent) as images:
        return images.inventory.dump_criu_run_id or ""


def copy_round(
    pid: int, out: ImageSetWriter, tracking: Tracking, timeout: float, warnings: list[str], known: Known | None = None
) -> PreDumpResult:
    """Write a set with what was written since the last one; the marks refer to it afterwards."""
    plans: list[_Plan] = []
    try:
        frozen = _mark(pid, tracking, timeout, plans)
        pages, kept = 0, 0
        out.meter.expect(memory_of(plan.pid for plan in plans) if out.meter.is_read else 0)
        for plan in plans:
            written, left = _copy(plan, out)
            pages, kept = pages + written, kept + left
        for region in shared_memory(plan.pid for plan in plans):
            with suppress(FileNotFoundError, PermissionError):  # it is gone, or not ours to read: the dump will see
                pages += write_shared(region.path, region.number, out, known=known)
    finally:
        for plan in plans:
            plan.memory.close()
    _root(pid)  # it must be there still
    tracking.since = str(uuid.uuid4())
    out.write("inventory", InventoryEntry(
        img_version=IMAGE_VERSION, fdinfo_per_id=True, ns_per_id=True, dump_uptime=_uptime(),
        dump_criu_run_id=tracking.since,
    ))  # fmt: skip
    out.commit()
    return PreDumpResult(out.path, [plan.pid for plan in plans], pages, kept, frozen, warnings)


def memory_of(pids: Iterable[int]) -> int:
    """About how many bytes of memory these processes have that is no file's."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it may have ended
            fields = procfs.status(pid)
            total += sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap") if name in fields)
    return total << 10


def _uptime() -> int:
    """Microseconds, as an inventory has it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


def _mark(pid: int, tracking: Tracking, timeout: float, plans: list[_Plan]) -> float:
    """Stop the tree, mark its pages, and let it go on. Returns for how many seconds it stood still."""
    journal = Journal()
    with Guardian(journal), Tree(pid, timeout=timeout) as tree:
        tree.freeze()
        frozen = time.monotonic()
        living = with_memory(tree.tasks)
        tracking.keep_only({(task.pid, task.stat.start_time) for task in living})
        for task in living:
            changes = tracking.arm(task, _layout(task.pid), journal)
            plans.append(_Plan(task.pid, TaskMemory(task.pid), changes))
    return time.monotonic() - frozen


def _layout(pid: int) -> list[Mapping]:
    try:
        return procfs.mappings(pid)
    except ProcessLookupError as error:
        raise ended(pid) from error


def _copy(plan: _Plan, out: ImageSetWriter) -> tuple[int, int]:
    """Write a task's pages; how many, and how many are left to the parent."""
    pages = left = 0
    with PagemapWriter(out, plan.pid) as pagemap:
        for start, length, written in plan.changes:
            if not written:
                pagemap.add(start, length // PAGE, PE_PARENT)
                left += length // PAGE
                out.meter.add(length)
                continue
            for at in range(start, start + length, BUFFER):
                portion = min(BUFFER, start + length - at)
                pages += _copy_portion(plan.memory, pagemap, at, portion)
                out.meter.add(portion)
    return pages, left


def _copy_portion(memory: TaskMemory, pagemap: PagemapWriter, start: int, length: int) -> int:
    """Copy what is there of it still. A page that went away is not marked any more, so no later set asks for it."""
    try:
        data = memory.read(start, length)
    except OSError:
        if length == PAGE:
            return 0
        return sum(_copy_portion(memory, pagemap, at, PAGE) for at in range(start, start + length, PAGE))
    pagemap.add(start, length // PAGE, PE_PRESENT)
    while data:
        data = data[os.write(pagemap.fd, data) :]
    return length // PAGE
