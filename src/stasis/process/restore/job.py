# SPDX-License-Identifier: Apache-2.0
"""The restore of a process tree: read and check, make the processes, make them what they were, let them run. All of
them, or none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from stasis.errors import StasisError, UnsupportedError
from stasis.linux import procfs, ptrace
from stasis.linux.pidfd import Pidfd
from stasis.process.cgroups import join, set_of
from stasis.process.dump.ids import own_kinds_of
from stasis.process.files.connections import let_all_live
from stasis.process.files.descriptor import set_owner
from stasis.process.files.locks import packed_lock, posix_locks
from stasis.process.files.opening import FileSet
from stasis.process.files.options import FileOptions
from stasis.process.files.paths import Paths
from stasis.process.guardian import Guardian
from stasis.process.images.imageset import ImageSet
from stasis.process.images.pagemap import Pagemap
from stasis.process.images.schema.tasks import TaskKobjIdsEntry
from stasis.process.journal import Journal
from stasis.process.meter import Meter, Progress
from stasis.process.remote import Remote
from stasis.process.restore.beside import give_directory, give_pidfds, make_beside
from stasis.process.restore.crew import Roll, adopting
from stasis.process.restore.memory import replace_memory
from stasis.process.restore.outfit import Ready
from stasis.process.restore.plan import TaskPlan, read_tree
from stasis.process.restore.spawn import Nursery, spawn
from stasis.process.restore.tasks import arm_timers, give_process_state, make_timers, set_dumpable
from stasis.process.restore.threads import give_state, make_threads
from stasis.process.seccomp import Filters
from stasis.process.traces import Traces
from stasis.process.tree import TaskState

__all__ = ["RestoreOptions", "RestoreResult", "restore"]

OPTIONS = ptrace.PTRACE_O_TRACESYSGOOD
NOTHING: Mapping[str, str] = MappingProxyType({})


class RestoreOptions(NamedTuple):
    """How to restore. `map_paths`: beginnings of paths in the images, and what stands for them here.
    `files`: what stands for open files of the images. `pid_namespace`: into a new one, where all pids are free.
    `manage_cgroups`: put processes into the control groups that they were in, as far as that goes; below others, by the
    names of controllers or "", with `cgroup_roots`. `sibling`: the first process becomes a child of our parent.
    `links`: what the other ends of network devices of the tree are to be called here, as NAME or NAME@BRIDGE. `hook`
    is called with "pre-restore" before anything is made, "post-restore" and "pre-resume" when all is there and stands
    still, and "post-resume" when it runs, each with the first process's pid, 0 before it is there. What it raises
    before "post-resume" ends the tree. `leave_stopped`: all processes are stopped, as by SIGSTOP. `root`: the directory
    that is the root of the tree from now on; all paths of the images are below it. `progress` is called with the bytes
    of memory that are there again, and with how many the images have."""

    map_paths: Mapping[str, str] = NOTHING
    files: FileOptions = FileOptions()
    pid_namespace: bool = False
    manage_cgroups: bool = True
    cgroup_roots: Mapping[str, str] = NOTHING
    sibling: bool = False
    links: Mapping[str, str] = NOTHING
    hook: Callable[[str, int], None] = lambda *_: None
    leave_stopped: bool = False
    root: str = ""
    progress: Progress | None = None


class RestoreResult(NamedTuple):
    """What was restored: the first process, and all. `init`: the first process of their pid namespace where they have
    one of their own; it ends with them and with the status of `pid`. Seconds for all of it, of which `forking_seconds`
    for making processes and their files. `pages_shared` of `pages_compared` were found to be those of the parent, as
    after a fork, and are one with them."""

    pid: int
    pids: list[int]
    init: int = 0
    warnings: list[str] | None = None
    forking_seconds: float = 0.0
    seconds: float = 0.0
    pages_compared: int = 0
    pages_shared: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self._asdict()


def restore(images: str | os.PathLike[str], options: RestoreOptions | None = None) -> RestoreResult:
    """Restore the process tree of an image set; its first process, or the `init` of its pid namespace, becomes a child
    of this one.

    To be called in a process with one thread. Raises StasisError and OSError; no process is left then.
    """
    chosen = options or RestoreOptions()
    with Traces.of_restore() as traces:
        if chosen.pid_namespace:
            return _restore_inside(images, chosen._replace(pid_namespace=False), traces)
        return _restore_here(images, chosen, traces)


def _restore_here(images: str | os.PathLike[str], chosen: RestoreOptions, traces: Traces) -> RestoreResult:
    began = time.monotonic()
    chosen.hook("pre-restore", 0)
    with ImageSet.open(images) as opened:
        root = read_tree(opened)
        assert root.ids is not None
        own = own_kinds_of(opened, root.ids)
        outside = _mapper(_paths(opened, root.ids, own, chosen))
        files = FileSet(opened, Paths(opened, outside, _mapper(chosen.map_paths)), chosen.files)
        files.made_late = {plan.pid for plan in root.walk() if plan.birth.beside}
        for plan in root.walk():
            if plan.ids is not None:
                files.check(plan.ids.files_id)
        chain = opened.chain()
        _expect(opened, chosen.progress)
        if chosen.sibling and (chosen.pid_namespace or "pid" in own):
            raise UnsupportedError("the first process of a pid namespace cannot be a sibling of the restorer",
                                   hint="restore it as a child")  # fmt: skip
        try:
            with _segments(opened, root, chain), Nursery(root, files, chain, chosen.links) as nursery:
                made = (_restore_first if "pid" in own else _restore)(nursery, chosen, traces)
        finally:
            for parent in chain[1:]:
                parent.close()
    return made._replace(seconds=time.monotonic() - began)


def _restore_inside(images: str | os.PathLike[str], options: RestoreOptions, traces: Traces) -> RestoreResult:
    from stasis.process.restore.namespace import restore_inside

    with ImageSet.open(images) as opened:
        tree = read_tree(opened)
        if tree.ids is not None and "pid" in own_kinds_of(opened, tree.ids):
            return restore(images, options)  # it comes with one
        wanted = [tid for plan in tree.walk() for tid in plan.entry.threads]
        root = next(iter(opened.messages("pstree"))).pid

    def work() -> tuple[int, list[str]]:
        result = restore(images, options)
        return result.pid, result.warnings or []

    with Guardian(Journal(), traces.undo):
        init, pids, warnings = restore_inside(wanted, work)
        traces.clear()
    return RestoreResult(pids[root], [outer for inner, outer in pids.items() if inner in wanted], init, warnings)


def _restore_first(nursery: Nursery, options: RestoreOptions, traces: Traces) -> RestoreResult:
    """Into a pid namespace that the tree had of its own. A guardian in there would end with it."""
    from stasis.process.restore.container import restore_first

    def work(first: int, tell: Callable[[dict[str, Any]], None]) -> None:
        chosen = options._replace(hook=lambda name, pid: options.hook(name, first if pid else 0))
        _restore(nursery, chosen, traces, before=lambda made: tell(made.as_dict()))

    with Guardian(Journal(), traces.undo):
        report, pids = restore_first(nursery, work)
        traces.clear()
    made = RestoreResult(**report)
    _end_up(nursery.crew.files, options, pids[made.pid])
    return made._replace(pid=pids[made.pid], pids=[pids.get(pid, 0) for pid in made.pids])


def _segments(
    images: ImageSet, root: TaskPlan, chain: list[ImageSet]
) -> contextlib.AbstractContextManager[None]:
    """Those of the namespace that the tree has in common with who dumped it."""
    assert root.ids is not None
    home = (images.inventory.root_ids or root.ids).ipc_ns_id or 0
    if home not in images.numbers("ipcns-shm"):
        return contextlib.nullcontext()
    from stasis.process.sysvshm import segments_of

    return segments_of(images, home, chain)


def _expect(images: ImageSet, progress: Progress | None) -> None:
    if progress is None:
        return
    images.meter = Meter(progress)
    kinds = [(kind, number) for kind in ("pagemap", "pagemap-shmem") for number in images.numbers(kind)]
    found = [Pagemap.read(images, number, kind) for kind, number in kinds]
    images.meter.expect(sum(run.end - run.start for pagemap in found if pagemap is not None for run in pagemap.runs()))


def _paths(
    images: ImageSet, ids: TaskKobjIdsEntry, own: list[str], options: RestoreOptions
) -> Mapping[str, str]:
    """What stands for which paths. The root of a mount namespace is one mount of it, and others come from elsewhere."""
    if not options.root:
        return options.map_paths
    if "mnt" not in own:
        return {"/": options.root, **options.map_paths}
    from stasis.process.namespaces.mounting import root_path

    return {root_path(ids.mnt_ns_id or 0, images): options.root, **options.map_paths}


def _mapper(map_paths: Mapping[str, str]) -> Callable[[str], str]:
    def mapped(path: str) -> str:
        fitting = [old for old in map_paths if path == old or path.startswith(old.rstrip("/") + "/")]
        if not fitting:
            return path
        longest = max(fitting, key=len)
        return map_paths[longest].rstrip("/") + path[len(longest.rstrip("/")) :] or "/"

    return mapped


def _restore(
    nursery: Nursery, options: RestoreOptions, traces: Traces, *,
    before: Callable[[RestoreResult], None] | None = None,
) -> RestoreResult:
    """Make it all. With `before` the first process is there and waits, and its end will be ours: this is called before
    anything runs, and what follows is left to the caller."""
    root, files, chain = nursery.crew.root, nursery.crew.files, nursery.crew.chain
    living = [plan for plan in root.walk() if not plan.is_zombie]
    own = [plan for plan in living if not plan.birth.beside]
    roll, filters = Roll(), Filters(files.images)
    with Guardian(Journal(), roll.end, traces.undo), adopting() as end_all:
        try:
            nursery.crew.is_sibling = options.sibling
            began = time.monotonic()
            ready = spawn(nursery, has_root=before is not None)
            forking = time.monotonic() - began
            roll.enter(plan.pid for plan in own)
            warnings = join(files.images, _members(own), options.cgroup_roots) if options.manage_cgroups else []
            for plan in own:
                _seize(plan.pid)
            for plan in own:
                _become(plan, ready[plan.pid], chain, filters)
            if len(own) < len(living):
                roll.enter(plan.pid for plan in living)
                warnings += _join_beside(files.images, own, options)
                give_pidfds(living, files)
            for plan in living:
                _give_to_others(plan, files)
            _remove_marked(files.images, living)
            let_all_live(files, [(plan.pid, plan.ids.files_id) for plan in living if plan.ids is not None])
            for name in "post-restore", "pre-resume":
                options.hook(name, root.pid)
            made = RestoreResult(
                root.pid, [plan.pid for plan in root.walk()], 0, warnings, forking, 0.0,
                sum(one.pages_compared for one in ready.values()), sum(one.pages_shared for one in ready.values()),
            )  # fmt: skip
            if before is not None:
                before(made)
            _let_go(living, roll, stopped=options.leave_stopped)
            traces.clear()
        except BaseException as error:
            if options.sibling:
                roll.end()  # it is no child of ours
            _end(living)
            end_all()
            if isinstance(error, OSError):
                raise StasisError(f"the restore failed: {error.strerror or error}", errno=error.errno or 0) from error
            raise
    if before is None:
        _end_up(files, options, root.pid)
    return made


def _end_up(files: FileSet, options: RestoreOptions, pid: int) -> None:
    """All runs."""
    if files.images.has("remap-fpath"):
        from stasis.process.files.linkremap import forget_links

        forget_links(files)
    options.hook("post-resume", pid)


def _remove_marked(images: ImageSet, living: list[TaskPlan]) -> None:
    """In namespaces that the tree has of its own."""
    if not images.numbers("ipcns-shm"):
        return
    from stasis.process.namespaces.ipc import remove_marked

    lives = {plan.ids.ipc_ns_id: plan.pid for plan in living if plan.ids and "ipc" in own_kinds_of(images, plan.ids)}
    for number, pid in lives.items():
        if number in images.numbers("ipcns-shm"):
            remove_marked(images, number, pid)


def _members(living: list[TaskPlan]) -> list[tuple[int, int | None]]:
    return [(plan.pid, set_of(plan.core)) for plan in living if plan.core.tc is not None]


def _join_beside(images: ImageSet, own: list[TaskPlan], options: RestoreOptions) -> list[str]:
    """Those that began in the groups of another process, and were in other ones."""
    moved = [one for plan in own for one in plan.beside if _members([one])[0][1] != _members([plan])[0][1]]
    return join(images, _members(moved), options.cgroup_roots) if options.manage_cgroups else []


def _seize(pid: int) -> None:
    ptrace.seize(pid, OPTIONS | ptrace.PTRACE_O_EXITKILL)
    ptrace.interrupt(pid)
    stop = ptrace.wait_for_stop(pid)
    if stop.exited is not None:
        raise StasisError(f"process {pid} ended before it was restored")


def _become(plan: TaskPlan, ready: Ready, chain: list[ImageSet], filters: Filters) -> None:
    """Make a process what the image says."""
    assert plan.mm is not None
    task = plan.core.tc
    assert task is not None
    with Remote(plan.pid, procfs.mappings(plan.pid, flags=False), avoid=plan.mm.vmas) as remote:
        if ready.directory:
            give_directory(remote, plan, ready.directory)
        replace_memory(remote, plan.mm, ready, chain)
        _lock_again(remote, chain[0], plan.table_pids)
        give_process_state(remote, task)
        make_threads(remote, [tid for tid in plan.entry.threads if tid != plan.pid])
        together = make_beside(remote, plan, ready, chain[0])
        for one, its in together:
            _give(one, its, filters)
        set_dumpable(remote, plan.mm)
        for one, its in together:
            assert one.core.tc is not None
            arm_timers(its, one.core.tc)


def _give(plan: TaskPlan, remote: Remote, filters: Filters) -> None:
    """What it has beside its memory and descriptors; rights come last."""
    task = plan.core.tc
    assert task is not None
    make_timers(remote, task)
    for tid, core in plan.cores.items():
        give_state(remote, tid, core, filters)
    remote.leader.signal_mask = task.blk_sigset


def _give_to_others(plan: TaskPlan, files: FileSet) -> None:
    """Descriptions whose signals are for one thread, or for a process that was not there before."""
    assert plan.ids is not None
    for fd, wanted in files.owned_by_others(plan.ids.files_id):
        with Pidfd(plan.pid) as pidfd:
            ours = pidfd.get(fd)
        try:
            set_owner(ours, wanted)
        finally:
            os.close(ours)


def _lock_again(remote: Remote, images: ImageSet, pids: Sequence[int]) -> None:
    """The descriptors that memory was mapped from are closed, and with the first one of a file all locks went that the
    process had there (fcntl_locking(2)), or those `pids` with the same table."""
    for entry in (entry for pid in pids for entry in posix_locks(images, pid)):
        remote.call("fcntl", entry.fd, fcntl.F_SETLK, remote.put(packed_lock(entry)))


def _let_go(living: list[TaskPlan], roll: Roll, *, stopped: bool) -> None:
    """All at once, as far as that goes: up to here they end with us, from here on without us they live."""
    for plan in reversed(living):  # as long as the first process of a pid namespace ends with us, all do
        task = plan.core.tc
        if stopped or (task is not None and task.task_state == TaskState.STOPPED):
            os.kill(plan.pid, signal.SIGSTOP)
        ptrace.set_options(plan.pid, OPTIONS)
    roll.clear()
    ended = []
    for tid in (tid for plan in living for tid in plan.cores):
        try:
            ptrace.detach(tid)
        except ProcessLookupError:  # those that run already have ended it
            ended.append(tid)
    for tid in reversed(ended):  # a first thread's end is told when all others' were asked for
        if tid != living[0].pid:
            ptrace.wait_for_end(tid)


def _end(living: list[TaskPlan]) -> None:
    """End those that we trace already; all their threads have to be waited for."""
    for plan in living:
        for tid in reversed(plan.cores):
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                ptrace.poll_stop(tid)  # fails where it is not ours
                os.kill(plan.pid, signal.SIGKILL)
                ptrace.wait_for_end(tid)
