# SPDX-License-Identifier: Apache-2.0
"""The dump of a process tree: stop, look for what cannot be kept, write, and let go or end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stasis.errors import UsageError
from stasis.linux import procfs, ptrace
from stasis.linux.memlock import no_collection
from stasis.linux.procfs import Mapping
from stasis.process import keeper
from stasis.process.cgroups import GroupTable
from stasis.process.dump import mm
from stasis.process.dump.checks import check_tree
from stasis.process.dump.ids import FIRST_ID, Home, ObjectIds
from stasis.process.dump.inside import check_inside, dump_inside, entering
from stasis.process.dump.losses import losses
from stasis.process.dump.pages import Look, dump_private_pages, dump_shared_pages
from stasis.process.dump.predump import continued, memory_of
from stasis.process.dump.tasks import task_core, zombie_core
from stasis.process.dump.threads import thread_core, thread_info
from stasis.process.dump.tracking import Tracking
from stasis.process.files.connections import Connections
from stasis.process.files.descriptor import Descriptor
from stasis.process.files.kinds import all_kinds
from stasis.process.files.linkremap import LinkRemaps
from stasis.process.files.options import FileOptions
from stasis.process.files.table import FileTable, check_descriptors
from stasis.process.findings import Finding, Findings
from stasis.process.freezer import GroupFreezer
from stasis.process.guardian import Guardian
from stasis.process.images.codec import prepare
from stasis.process.images.schema.files import FdinfoEntry, FileEntry
from stasis.process.images.schema.inventory import DumpStatsEntry, InventoryEntry, StatsEntry
from stasis.process.images.schema.memory import MmEntry
from stasis.process.images.schema.tasks import CoreEntry, FsEntry, March, PstreeEntry, TaskKobjIdsEntry
from stasis.process.images.setwriter import ImageSetWriter, is_whole, staging_for
from stasis.process.journal import Journal
from stasis.process.meter import Meter, Progress
from stasis.process.namespaces.own import write_namespaces
from stasis.process.remote import Remote
from stasis.process.restore.crew import Roll
from stasis.process.roots import anchored
from stasis.process.seals import write_seals
from stasis.process.seccomp import FilterTable
from stasis.process.spaces import has_own
from stasis.process.tree import MOMENTS, Task, Tree

__all__ = ["DumpOptions", "DumpResult", "check", "dump"]

IMAGE_VERSION = 2


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """How to dump. `timeout`: seconds to stop the tree in. Without `leave_running` or `leave_stopped` it is ended.
    `parent`: the set of a pre-dump, to write only what changed since. `pre_copy`: at most so many rounds of copying
    memory before the tree is stopped. `files`: what is done about open files that need a decision. `track`: what a tree
    that is left running writes from then on is watched, so that another dump can continue this set. `freeze_group`: the
    directory of a control group that all are in, which stands still while they are seized. `hook` is called with
    "pre-dump" before the tree is stopped and with "post-dump" when the set is in its place, before the tree is let go;
    what it raises undoes the dump. A tree that is left running goes on before, where there is none. `progress` is
    called with the bytes of memory that are copied, and with about how many there are."""

    leave_running: bool = False
    leave_stopped: bool = False
    timeout: float = 10.0
    parent: str | None = None
    pre_copy: int = 0
    files: FileOptions = field(default_factory=FileOptions)
    track: bool = False
    freeze_group: str = ""
    hook: Callable[[str], None] | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class DumpResult:
    """What was dumped. Seconds, pages of 4 KiB. `frozen_seconds`: from standstill to when everything is taken from the
    tree, of which `pages_seconds` for memory. What was noted is written to images behind that, and waits for the disk.
    `pages_in_parent`: those that the parent has."""

    images: str
    pids: list[int]
    threads: int
    pages: int
    freezing_seconds: float
    frozen_seconds: float
    pages_seconds: float
    pages_in_parent: int = 0
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def check(pid: int, *, timeout: float = 10.0, files: FileOptions | None = None) -> list[Finding]:
    """What of a process tree a dump could not keep; it is stopped for a moment. Raises what `Tree.freeze` raises."""
    if way := entering(pid):
        return check_inside(pid, way, lambda inner: _check(inner, timeout, files))
    return _check(pid, timeout, files)


def _check(pid: int, timeout: float, files: FileOptions | None) -> list[Finding]:
    with anchored(), Tree(pid, timeout=timeout) as tree:
        return list(_stand_still(tree, _Seen(), files)[0])


def dump(pid: int, images: str | os.PathLike[str], options: DumpOptions | None = None) -> DumpResult:
    """Dump a process and its descendants to the directory `images`, which is complete afterwards or not there.

    To be called in a process with one thread. Raises UnsupportedError with all that cannot be kept, before anything is
    touched; whatever fails, the tree goes on as it was.
    """
    chosen = options or DumpOptions()
    if chosen.track and not chosen.leave_running:
        raise UsageError("only a tree that is left running can be watched", hint="leave it running, or do not track it")
    if way := entering(pid):
        ends = not chosen.leave_running and not chosen.leave_stopped
        return dump_inside(pid, way, images, lambda inner, path: _dump(inner, path, chosen), ends=ends,
                           stops=chosen.leave_stopped, watched=chosen.track or chosen.parent is not None)  # fmt: skip
    return _dump(pid, images, chosen)


def _dump(pid: int, images: str | os.PathLike[str], chosen: DumpOptions) -> DumpResult:
    """From where its pids are ours."""
    journal, connections, roll, links = Journal(), Connections(chosen.files.network_lock), Roll(), LinkRemaps()
    group = GroupFreezer(chosen.freeze_group, chosen.timeout) if chosen.freeze_group else None
    if chosen.hook is not None:
        chosen.hook("pre-dump")
    if chosen.pre_copy:
        _refuse_early(pid, chosen)
    prepare(CoreEntry, FdinfoEntry, FileEntry, FsEntry, InventoryEntry, MmEntry, PstreeEntry, TaskKobjIdsEntry)
    all_kinds(chosen.files)
    staging = staging_for(images)
    with (
        no_collection(),
        Guardian(journal, partial(shutil.rmtree, staging, ignore_errors=True),
                 lambda: None if is_whole(images) else links.remove(),
                 group.put_back if group is not None else bool, roll.end,
                 first=lambda: None if roll.is_called else connections.release()),
        ImageSetWriter(images, staging=staging, holds=True, meter=Meter(chosen.progress)) as out,
        continued(pid, out, chosen.parent, chosen.pre_copy, chosen.timeout, chosen.track) as (
            tracking, warnings,
        ),
        anchored(),
        Tree(pid, timeout=chosen.timeout, group=group) as tree,
        connections, links,
    ):
        started = time.monotonic()
        seen = _Seen()
        findings, frozen = _stand_still(tree, seen, chosen.files)
        findings.refuse()
        writing = _Dump(out, journal, seen, tracking, chosen, connections, links)
        out.meter.expect(memory_of(seen.layouts) if out.meter.is_read else 0)
        for task in tree.tasks:
            writing.add(task)
        writing.finish(tree)
        taken, threads = time.monotonic(), sum(len(task.threads) for task in tree.tasks)
        if chosen.leave_running and chosen.hook is None:
            _let_run_on(tree, connections)  # it need not wait for images and disks, and nobody is to say no
        result = DumpResult(
            os.fspath(images), [task.pid for task in tree.tasks], threads, writing.pages, frozen - started,
            taken - frozen, writing.pages_seconds, writing.pages_in_parent, warnings + writing.warnings,
        )  # fmt: skip
        out.write("stats-dump", _statistics(result))
        if chosen.hook is not None:
            out.commit()  # who is called looks at the set, or sends it on
            try:
                chosen.hook("post-dump")
            except BaseException:
                out.withdraw()
                raise
        if chosen.leave_running:
            _let_run_on(tree, connections)
        elif chosen.leave_stopped:
            connections.release()
        if chosen.hook is None:
            out.commit()
        ends = not chosen.leave_running and not chosen.leave_stopped
        with roll.called([task.pid for task in tree.tasks if ends and not task.is_zombie]):
            connections.keep()
            links.keep()
            if chosen.track:
                tracking.keep_only({(task.pid, task.stat.start_time) for task in tree.tasks})
                tracking.since = connections.run_id
                keeper.give((pid, procfs.stat(pid).start_time), tracking)
            _let_go(tree, chosen)
        return result


def _let_run_on(tree: Tree, connections: Connections) -> None:
    if connections.count:
        connections.release()
    tree.thaw()


def _statistics(result: DumpResult) -> StatsEntry:
    """As criu tells them: microseconds and pages."""
    return StatsEntry(dump=DumpStatsEntry(
        freezing_time=int(result.freezing_seconds * 1e6), frozen_time=int(result.frozen_seconds * 1e6),
        memdump_time=int(result.pages_seconds * 1e6), memwrite_time=int(result.pages_seconds * 1e6),
        pages_scanned=result.pages + result.pages_in_parent, pages_skipped_parent=result.pages_in_parent,
        pages_written=result.pages, pages_lazy=0,
    ))  # fmt: skip


def _refuse_early(pid: int, options: DumpOptions) -> None:
    """Before memory is copied for a dump that will be refused."""
    with anchored(), Tree(pid, timeout=options.timeout) as tree:
        _stand_still(tree, _Seen(), options.files)[0].refuse()


def _let_go(tree: Tree, options: DumpOptions) -> None:
    if options.leave_running:
        return
    if options.leave_stopped:
        for task in tree.tasks:
            if not task.is_zombie:
                os.kill(task.pid, signal.SIGSTOP)
        return
    if tree.root_pid == 1:  # the first process of a namespace cannot be killed from within, but ends with its tracer
        ptrace.set_options(1, ptrace.PTRACE_O_EXITKILL)
        tree.root.threads.clear()
    for task in reversed(tree.tasks):
        if not task.is_zombie:
            os.kill(task.pid, signal.SIGKILL)
    for task in tree.tasks:
        for thread in reversed(task.threads):  # the first one's end is told when all others' were asked for
            ptrace.wait_for_end(thread.tid)
        task.threads.clear()


class _Seen:
    """What was found of each process while the tree was looked at, and need not be asked for again."""

    def __init__(self) -> None:
        self.layouts: dict[int, list[Mapping]] = {}
        self.descriptors: dict[int, list[Descriptor]] = {}


def _stand_still(
    tree: Tree, seen: _Seen, files: FileOptions | None = None
) -> tuple[Findings, float]:
    """Stop the tree and look at it; where all that is in the way may be gone in a moment, at a later moment again.
    Returns what is in the way, and since when the tree stands still."""
    for pause in (*MOMENTS, 0.0):
        tree.freeze()
        frozen = time.monotonic()
        findings = _look(tree, seen, files)
        if not pause or not findings.pass_by:
            break
        tree.thaw()
        time.sleep(pause)
    return findings, frozen


def _look(tree: Tree, seen: _Seen, files: FileOptions | None = None) -> Findings:
    """Everything that cannot be kept."""
    findings = Findings()
    seen.layouts.clear()
    check_tree(tree, findings, shell_job=files is not None and files.shell_job)
    for task in tree.tasks:
        if task.is_zombie:
            continue
        seen.layouts[task.pid] = procfs.mappings(task.pid)
        mm.check_mappings(task.pid, seen.layouts[task.pid], findings, files)
    seen.descriptors = check_descriptors([task.pid for task in tree.tasks if not task.is_zombie], findings, files)
    return findings


class _Dump:
    """The set that is being written."""

    def __init__(
        self, out: ImageSetWriter, journal: Journal, seen: _Seen, tracking: Tracking,
        options: DumpOptions, connections: Connections, links: LinkRemaps,
    ) -> None:
        self.pages = 0
        self.pages_seconds = 0.0
        self.warnings: list[str] = []
        self._out, self._journal, self._layouts = out, journal, seen.layouts
        self._tracking = tracking
        self._ids = ObjectIds()
        self._filters = FilterTable()
        self._groups = GroupTable()
        self._shared: set[int] = set()
        self._spaces: dict[int, MmEntry] = {}
        self._segments: dict[int, tuple[int, Mapping]] = {}
        self._connections = connections
        self.pages_in_parent = 0
        self._options = options
        self._files = FileTable(out, options.files, connections, seen.descriptors, links)

    def add(self, task: Task) -> None:
        """Write everything of a task."""
        if task.is_zombie:
            self._out.write("core", CoreEntry(mtype=March.X86_64, tc=zombie_core(task)), number=task.pid)
            return
        ids = self._ids.of(task.pid)
        self._out.write("ids", ids, number=task.pid)
        self._files.dump_descriptors(task.pid, ids.files_id)
        known = self._spaces.get(ids.vm_id)
        changes = self._changes(task) if known is None else lambda *_: None
        with self._remote(task) as remote:
            if known is None:
                self._spaces[ids.vm_id] = self._memory(remote, task, changes)
            else:  # its pages are those of a process that was here before
                self._out.write("mm", known, number=task.pid)
            self.warnings += losses(remote, task, self._layouts[task.pid])
            self._cores(remote, task, ids)
            if known is None and not self._options.track:
                self._tracking.end(remote, task, self._layouts[task.pid])
        umask = int(procfs.status(task.pid)["Umask"], 8)
        cwd, root = (self._files.path_file(task.pid, link, os.O_RDONLY) for link in ("cwd", "root"))
        self._out.write("fs", FsEntry(cwd_id=cwd, root_id=root, umask=umask), number=task.pid)

    @contextmanager
    def _remote(self, task: Task) -> Iterator[Remote]:
        with Remote(task.pid, self._layouts[task.pid], self._journal) as remote:
            yield remote

    def _changes(self, task: Task) -> Look:
        """What tells the pages of a mapping that were written; where the task is to be watched on, they are marked."""
        if not self._options.track:
            return partial(self._tracking.changes, task)
        marked = self._tracking.mark(task, self._layouts[task.pid], self._journal)
        return lambda mapping, _: marked.get(mapping.start)

    def _memory(self, remote: Remote, task: Task, changes: Look) -> MmEntry:
        found = mm.vmas(task.pid, self._layouts[task.pid], self._files)
        exe = self._files.path_file(task.pid, "exe", os.O_RDONLY)
        entry = mm.mm_entry(remote, task, found, exe)
        self._out.write("mm", entry, number=task.pid)
        write_seals(task.pid, self._layouts[task.pid], self._out)
        started = time.monotonic()
        pages, left = dump_private_pages(remote, found, self._out, changes)
        self.pages, self.pages_in_parent = self.pages + pages, self.pages_in_parent + left
        for vma in found:
            if vma.entry.status & mm.VmaStatus.SYSVIPC and not has_own("ipc", task.pid):
                self._segments[vma.entry.shmid] = task.pid, vma.mapping
            if mm.is_shared_memory(vma.entry) and vma.entry.shmid not in self._shared:
                self._shared.add(vma.entry.shmid)
                self.pages += dump_shared_pages(task.pid, vma, self._out, self._tracking.shared)
        self.pages_seconds += time.monotonic() - started
        return entry

    def _cores(self, remote: Remote, task: Task, ids: TaskKobjIdsEntry) -> None:
        for thread in task.threads:
            core = CoreEntry(
                mtype=March.X86_64, thread_info=thread_info(remote, thread.tid),
                thread_core=thread_core(remote, thread.tid),
            )  # fmt: skip
            assert core.thread_core is not None
            core.thread_core.seccomp_filter = self._filters.last_of(thread.tid)
            if thread.tid == task.pid:
                core.tc, core.ids = task_core(remote, task), ids
                core.tc.cg_set = self._groups.of(task.pid)
            self._out.write("core", core, number=thread.tid)

    def finish(self, tree: Tree) -> None:
        """Write what concerns the tree as a whole."""
        parents = {child.pid: task.pid for task in tree.tasks for child in task.children}
        for task in tree.tasks:
            self._out.write("pstree", PstreeEntry(
                pid=task.pid, ppid=parents.get(task.pid, 0), pgid=task.stat.pgrp, sid=task.stat.session,
                threads=[thread.tid for thread in task.threads] or [task.pid],
            ))  # fmt: skip
        self._files.finish()
        self.warnings += self._files.warnings
        self.warnings += write_namespaces(self._out)
        if self._segments:
            from stasis.process.sysvshm import write_segments

            namespace = Home.ids()["ipc_ns_id"]
            self.pages += write_segments(self._segments, namespace, self._out, known=self._tracking.shared)
        self._filters.write(self._out)
        ours = FIRST_ID - 1
        root_ids = TaskKobjIdsEntry(vm_id=ours, files_id=ours, fs_id=ours, sighand_id=ours)
        for name, number in Home.ids().items():
            setattr(root_ids, name, number)
        uptime = int(float(Path("/proc/uptime").read_text().split()[0]) * 1_000_000)
        self._out.write("inventory", InventoryEntry(
            img_version=IMAGE_VERSION, fdinfo_per_id=True, ns_per_id=True, root_ids=root_ids, dump_uptime=uptime,
            root_cg_set=self._groups.write(self._out), tcp_close=self._options.files.tcp == "close" or None,
            dump_criu_run_id=self._connections.run_id, network_lock_method=self._connections.method,
        ))  # fmt: skip

