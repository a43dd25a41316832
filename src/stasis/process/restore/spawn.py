# SPDX-License-Identifier: Apache-2.0
"""Making the processes of a tree: each one a child of its parent, with its pid, session, files and directories.

Every process is this program still, up to the moment in which the restorer seizes it and replaces its memory. What has
to be done by the process itself and can be done in Python is done here; then it waits. There are three stages (see
`crew.py`): all are made, and lead their sessions and groups; all have joined their groups; all are ready. Helpers
stand in for leaders that are dead until the groups are joined.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn, Self

from stasis.errors import BusyError, PermissionDeniedError, StasisError, UnsupportedError
from stasis.linux import process, procfs
from stasis.linux.clone3 import CLONE_PARENT, fork_as
from stasis.linux.namespaces import unshare
from stasis.process.restore.crew import Crew, Gate, Reports, collect, live_with, outlive_nobody
from stasis.process.restore.outfit import Ready, enter_namespaces, open_everything, prepare, share_memory, take_terminal
from stasis.process.sharing import CLONE_FS, PASSED

if TYPE_CHECKING:
    from stasis.process.files.opening import FileSet
    from stasis.process.images import ImageSet
    from stasis.process.restore.plan import TaskPlan

__all__ = ["Nursery", "Ready", "refusal", "spawn"]

NOTHING: Mapping[str, int] = MappingProxyType({})
PAUSE = 0.002
DEAD_PATIENCE, GONE_PATIENCE = 2.0, 0.05
STAGES = ("made", "joined", "settled")
"""Behind each one is a gate. The last one is for trees in which processes share a descriptor table: then all but one of
those have done what they do with descriptors."""


class Nursery:
    """What the processes that are made and the restorer have in common; a context manager for the restorer."""

    def __init__(self, root: TaskPlan, files: FileSet, chain: list[ImageSet], links: Mapping[str, str]) -> None:
        stages = STAGES if any(len(plan.table) > 1 for plan in root.walk()) else STAGES[:-1]
        self.crew = Crew(root, files, chain, Reports(), {stage: Gate() for stage in stages}, links)

    def be_first(self, started: int, *, is_foreign: bool) -> NoReturn:
        """In a process that is the first of its pid namespace and whose parent is outside: its life, from the moment
        on in which something can be read from `started`. `is_foreign`: it has a user namespace of its own."""
        self.leave()
        root = self.crew.root
        process.set_parent_death_signal(signal.SIGKILL)
        if not os.read(started, 1):
            os._exit(1)  # the restorer ended
        if is_foreign:
            _be_root()
        os.close(started)
        _run(root, self.crew, lambda: _live(root, self.crew, 0, 0))

    def leave(self) -> None:
        """In a process that is made: keep nothing that is the restorer's."""
        self.crew.reports.close_reader()
        for gate in self.crew.gates.values():
            gate.leave()

    def close(self) -> None:
        """Nobody waits any more."""
        self.crew.reports.close_reader()
        self.crew.reports.close_writer()
        for gate in self.crew.gates.values():
            gate.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _be_root() -> None:
    """In a user namespace whose maps are there: its root, where it has one. This takes the signal for a parent's death
    away (commit_creds())."""
    with contextlib.suppress(OSError):  # there is none: the rights that a new namespace gives do as well
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    process.set_dumpable()
    process.set_parent_death_signal(signal.SIGKILL)


def spawn(nursery: Nursery, *, has_root: bool = False) -> dict[int, Ready]:
    """Make all processes, the root as a child of ours, unless it is there; what each told, by pid. Zombies have ended.

    To be called within `adopting`. Raises StasisError; the processes made so far are there still.
    """
    crew = nursery.crew
    reports = crew.reports
    helper = 0 if has_root else _make_root(nursery)
    first = helper or crew.root.pid
    reports.close_writer()
    for stage, gate in crew.gates.items():
        gate.open(len(collect(reports, first, stage)))
    if helper:
        os.waitpid(helper, 0)
    found = {report["pid"]: report for report in collect(reports, first, "ready") if "pieces" in report}
    for report in list(found.values()):
        for other in report.pop("others", ()):
            found[other["pid"]].update(other)
    return {pid: Ready(report) for pid, report in found.items()}


def _make_root(nursery: Nursery) -> int:
    """The first process: in its session, whose leader a helper plays where its pid is free; else in ours."""
    crew = nursery.crew
    root = crew.root
    _take_in(root)
    maker = _Maker(crew, close=nursery.leave)
    if root.entry.sid not in (root.pid, os.getsid(0)):
        try:
            if crew.is_sibling:
                raise BusyError("a helper would be the child of a stranger, who would have to wait for it")
            return maker.helper_of(root.entry.sid, [root])
        except BusyError:
            crew.is_guest = True  # the leader lives, outside of the tree, or the session has other members
    maker.child(root, is_sibling=crew.is_sibling)
    return 0


def _take_in(root: TaskPlan) -> None:
    """Processes whose session or group was led from outside of their pid namespace, which has no number for it (0), are
    in those of the restorer."""
    for plan in root.walk():
        plan.entry.sid = plan.entry.sid or os.getsid(0)
        plan.entry.pgid = plan.entry.pgid or os.getpgid(0)


class _Maker:
    """Makes children of this process, and notes them. `close` is called in each."""

    def __init__(
        self, crew: Crew, close: Callable[[], None] = lambda: None, passed: Mapping[str, int] = NOTHING
    ) -> None:
        """`passed`: what passes through this process, by kind."""
        self.crew = crew
        self._has = dict(passed)
        self.made: list[int] = []
        self.helpers: list[int] = []
        self._close = close

    def child(self, plan: TaskPlan, *, is_sibling: bool = False) -> None:
        """A process of the tree."""
        parent = os.getppid() if is_sibling else os.getpid()
        self.made.append(plan.pid)
        self.leave_for(plan.birth.passed)
        if _fork(plan.pid, CLONE_PARENT if is_sibling else plan.birth.flags) == 0:
            self._close()
            _run(plan, self.crew, lambda: _live(plan, self.crew, parent, parent))

    def leave_for(self, wanted: Mapping[str, int]) -> None:
        """Have tables and directories that are to be `wanted`, by kind, and no more those that others have."""
        for kind, number in wanted.items():
            if self._has.get(kind, number) != number:
                unshare(PASSED[kind])
            self._has[kind] = number

    def helper_of(self, sid: int, plans: list[TaskPlan]) -> int:
        """Processes whose session has lost its leader: children of a helper in its place, and ours when it ends."""
        parent = os.getpid()
        self.made.append(sid)
        process.set_subreaper(True)
        if (pid := _fork(sid)) == 0:
            self._close()
            _run(plans[0], self.crew, lambda: _lead_session(plans, self.crew, parent))
        self.helpers.append(pid)
        return pid

    def helper_for_group(self, plan: TaskPlan) -> None:
        """A leader for the group of this process, whose own is dead. It is left alone where the group lives on."""
        parent, pgid = os.getpid(), plan.entry.pgid
        with contextlib.suppress(PermissionError):
            os.setpgid(0, pgid)
            return
        try:
            if (pid := _fork(pgid)) == 0:
                _run(plan, self.crew, lambda: _lead_group(self.crew, parent))
        except BusyError:
            if self.crew.is_guest:
                return
            raise
        self.made.append(pid)
        self.helpers.append(pid)

    def dismiss(self) -> None:
        """Wait for the helpers' end."""
        for pid in self.helpers:
            os.waitpid(pid, 0)
        process.set_subreaper(False)


def _fork(pid: int, flags: int = 0) -> int:
    """With a little patience: right after a dump the old process may have ended and still be there."""
    began = time.monotonic()
    while True:
        try:
            return fork_as(pid, flags)
        except OSError as error:
            if error.errno != errno.EEXIST or time.monotonic() - began > _patience(pid):
                raise refusal(pid, error) from error
            time.sleep(PAUSE)


def _patience(pid: int) -> float:
    """Seconds to wait for a pid that is taken: somebody is about to wait for the dead, and it may be gone just now."""
    try:
        return DEAD_PATIENCE if procfs.stat(pid).state in "ZX" else 0.0
    except ProcessLookupError:
        return GONE_PATIENCE


def refusal(pid: int, error: OSError) -> StasisError:
    if error.errno == errno.EEXIST:
        who = process.name(pid) if os.path.exists(f"/proc/{pid}") else "a session or process group of others"
        return BusyError(f"the pid {pid} is taken by {who}", errno=errno.EEXIST,
                         hint="end that process, or restore with --pid-namespace")  # fmt: skip
    if error.errno == errno.EPERM:
        return PermissionDeniedError("choosing the pid of a process needs CAP_CHECKPOINT_RESTORE", hint="run as root")
    return UnsupportedError(f"the pid {pid} cannot be given: {error.strerror}", errno=error.errno or 0)


def _run(plan: TaskPlan, crew: Crew, life: Callable[[], None]) -> NoReturn:
    """The life of a process that we made. What goes wrong is told to the restorer."""
    try:
        life()
    except StasisError as error:
        crew.report(**{"message": str(error), **error.as_dict()})
    except OSError as error:
        crew.report(**StasisError(f"process {plan.pid} cannot be made: {error}", errno=error.errno or 0).as_dict())
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: {error!r} in the making of process {plan.pid}", file=sys.stderr, flush=True)
        crew.report(**StasisError(f"process {plan.pid} cannot be made").as_dict())
    while os.getpid() == 1:  # to end would end the restorer, before it has told
        signal.pause()
    os._exit(1)


def _lead_session(plans: list[TaskPlan], crew: Crew, parent: int) -> None:
    """A helper's life in place of a session's leader."""
    live_with(parent, parent)
    os.setsid()
    me = os.getpid()
    maker = _Maker(crew)
    for plan in plans:
        maker.made.append(plan.pid)
        if _fork(plan.pid) == 0:
            _run(plan, crew, lambda: _live(plan, crew, parent, me))  # noqa: B023
    crew.stage("made", maker.made)
    crew.stage("joined", maker.made)
    _settle(crew, maker.made)
    crew.report(stage="ready", pid=os.getpid(), made=maker.made)
    os._exit(0)


def _lead_group(crew: Crew, parent: int) -> None:
    """A helper's life in place of a group's leader."""
    live_with(parent, parent)
    os.setpgid(0, 0)
    crew.stage("made", [])
    crew.stage("joined", [])
    _settle(crew, [])
    crew.report(stage="ready", pid=os.getpid(), made=[])
    os._exit(0)


def _live(plan: TaskPlan, crew: Crew, parent: int, maker_pid: int) -> None:
    """A process of the tree, until it is seized; never returns. `maker_pid` is that of a helper where one stands in for
    the leader of its session."""
    if parent == maker_pid:
        live_with(parent, parent)
    if plan is crew.root:
        enter_namespaces(crew)
        open_everything(crew)
        _move_up(crew)
    elif crew.apart and plan.ids is not None:
        crew.apart.enter(plan.ids, but="mnt" if plan.birth.flags & CLONE_FS else "")
    share_memory(plan, crew)
    maker = _Maker(crew, passed=plan.birth.passed)
    _make_children(plan, maker)
    maker.leave_for({kind: number for kind, number in plan.ids_by_kind().items() if kind in PASSED})
    if crew.apart and plan.ids is not None:
        crew.apart.enter(plan.ids)  # who shared its directories with others could not before
    crew.stage("made", maker.made)
    _join_group(plan.entry.pgid, crew)
    crew.stage("joined", maker.made)
    if not plan.is_zombie:
        take_terminal(plan.pid, crew, first=False)
    _settle(crew, maker.made)
    maker.dismiss()
    live_with(parent, maker_pid)
    if plan.is_zombie:
        crew.report(stage="ready", pid=os.getpid(), made=maker.made)
        _end_as(plan)
    for child in plan.children:
        if child.is_zombie:  # its signal is to come before we are seized, when it is ignored still
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    crew.report(**prepare(plan, crew), stage="ready", made=maker.made)
    outlive_nobody(crew)


def _settle(crew: Crew, made: list[int]) -> None:
    if "settled" in crew.gates:
        crew.stage("settled", made)


def _move_up(crew: Crew) -> None:
    """Have our descriptors where they are in nobody's way; all below the first process inherits them."""
    crew.reports.writer = crew.files.move(crew.reports.writer)
    for gate in crew.gates.values():
        gate.reader = crew.files.move(gate.reader)
    crew.apart.move(crew.files.move)


def _join_group(pgid: int, crew: Crew) -> None:
    if os.getpgid(0) == pgid:
        return
    try:
        os.setpgid(0, pgid)
    except PermissionError:
        if not crew.is_guest:
            raise


def _make_children(plan: TaskPlan, maker: _Maker) -> None:
    """Those that were born before this process made its own session come first."""
    born_in = os.getsid(0)
    mine = plan.pid if plan.entry.sid == plan.pid else born_in
    orphans: dict[int, list[TaskPlan]] = {}
    for child in plan.children:
        if child.entry.sid == born_in != mine:
            maker.child(child)
    if mine != born_in:
        os.setsid()
        take_terminal(plan.pid, maker.crew, first=True)
    elif plan.entry.pgid == plan.pid:
        os.setpgid(0, 0)
    for child in plan.children:
        if child.entry.sid in (mine, child.pid) or (maker.crew.is_guest and child.entry.sid == plan.entry.sid):
            maker.child(child)
        elif child.entry.sid != born_in:
            orphans.setdefault(child.entry.sid, []).append(child)
    for sid, children in orphans.items():
        maker.helper_of(sid, children)
    if _is_first_of_dead_group(plan, maker.crew):
        maker.helper_for_group(plan)


def _is_first_of_dead_group(plan: TaskPlan, crew: Crew) -> bool:
    pgid = plan.entry.pgid
    if pgid in crew.pids or pgid in (os.getpgid(0), os.getsid(0)):
        return False
    own = (one for one in crew.root.walk() if not one.birth.beside)
    return next(one for one in own if one.entry.pgid == pgid) is plan


def _end_as(plan: TaskPlan) -> NoReturn:
    """End as a zombie did, with its status."""
    task = plan.core.tc
    status = 0 if task is None else task.exit_code
    procfs.write(procfs.SELF, "comm", (task.comm if task else "")[:15])
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if number := status & 0x7F:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(status >> 8 & 0xFF)
