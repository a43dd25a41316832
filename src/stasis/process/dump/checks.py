# SPDX-License-Identifier: Apache-2.0
"""What of a stopped tree cannot be kept, apart from its memory's layout and its files."""

from __future__ import annotations

from stasis.linux import procfs, ptrace
from stasis.linux.kcmp import Kcmp, compare
from stasis.process.cgroups import check_groups
from stasis.process.dump.ids import ObjectIds, namespace_ids
from stasis.process.dump.tasks import ns_pid
from stasis.process.findings import Findings
from stasis.process.fpu import lost_components
from stasis.process.kinship import Kin, unmakeable
from stasis.process.namespaces.own import check_namespaces
from stasis.process.remote import DISPATCHED
from stasis.process.seccomp import why_lost
from stasis.process.sharing import NAMES, Member, Sharing
from stasis.process.tree import Task, Tree
from stasis.process.vforks import is_in_vfork

__all__ = ["check_tree"]

OBJECTS = {"vm": Kcmp.VM, "files": Kcmp.FILES, "fs": Kcmp.FS}
SIGCHLD = 17
USER_CS = 0x33  # arch/x86/include/asm/segment.h, __USER_CS


def check_tree(tree: Tree, findings: Findings, *, shell_job: bool = False) -> None:
    """Note all of it. `shell_job`: what comes from who started the tree is to come from who restores it."""
    living = [task for task in tree.tasks if not task.is_zombie]
    check_namespaces(tree.root, living, findings)
    for task in tree.tasks:
        if task.is_zombie:
            _check_dead(task, findings)
    for task in living:
        _check_task(task, findings, may_lack_session=shell_job or tree.root_pid == 1)
        _check_threads(task, findings)
        check_groups(task, findings)
    _check_sharing(tree, findings)
    for pid, reason in unmakeable(_kin(tree.root)):
        findings.add(pid, "session", reason)


def _check_dead(task: Task, findings: Findings) -> None:
    if len(procfs.threads(task.pid)) > 1:
        findings.add(task.pid, "threads", "the first one has ended while others run, which no image can say")


def _check_task(task: Task, findings: Findings, *, may_lack_session: bool) -> None:
    fields = procfs.status(task.pid)
    if 0 in (task.stat.session, task.stat.pgrp) and not may_lack_session:
        reason = "the leader of its session or process group is outside of its pid namespace"
        findings.add(task.pid, "session", reason, "--shell-job")
    if int(fields["Pid"]) != ns_pid(fields):
        findings.add(task.pid, "pid", "it is in a pid namespace below ours")


def _check_threads(task: Task, findings: Findings) -> None:
    for thread in task.threads:
        where = f"thread {thread.tid}"
        if reason := why_lost(thread.tid):
            findings.add(task.pid, "seccomp", reason)
        if ptrace.registers(thread.tid).cs != USER_CS:
            findings.add(task.pid, where, "it runs 32 bit code, which is not supported")
        if ptrace.dispatches_system_calls(thread.tid):
            findings.add(task.pid, where, f"it {DISPATCHED}")
        for lost in lost_components(ptrace.fpu_state(thread.tid)):
            findings.add(task.pid, where, f"images have no place for {lost}")
        for name in ("files", "fs"):
            if thread.tid != task.pid and compare(OBJECTS[name], task.pid, thread.tid):
                findings.add(task.pid, where, f"it has another {NAMES[name]} than its process")


def _check_sharing(tree: Tree, findings: Findings) -> None:
    sharing = Sharing(_member(tree.root, ObjectIds()))
    for pid, what, reason in sharing.problems:
        findings.add(pid, what, reason)
    for pid, birth in sharing.births.items():
        if birth.beside and namespace_ids(pid) != namespace_ids(birth.maker):
            findings.add(pid, "namespaces", f"they are not those of process {birth.maker}, which it shares memory with")
    for task in tree.tasks:
        if task is not tree.root and not task.is_zombie and task.stat.exit_signal != SIGCHLD:
            findings.add(task.pid, "parent", f"its end is told by signal {task.stat.exit_signal} and not SIGCHLD, "
                                             "which no image can say")  # fmt: skip
    _check_outside(tree.root, findings)


def _check_outside(root: Task, findings: Findings) -> None:
    """What the first process shares with its parent, which stays behind."""
    parent = root.stat.ppid
    for name, kind in OBJECTS.items() if parent else ():
        try:
            is_shared = compare(kind, root.pid, parent) == 0
        except OSError:
            return  # not ours to look at, or gone
        if is_shared:
            findings.add(root.pid, NAMES[name], f"it is shared with process {parent}, which is not in the tree",
                         passes=is_in_vfork(parent, parent))  # fmt: skip


def _member(task: Task, known: ObjectIds) -> Member:
    ids = {} if task.is_zombie else known.shared(task.pid)
    return Member(task.pid, task.stat.session, task.stat.pgrp, ids, [_member(child, known) for child in task.children])


def _kin(task: Task) -> Kin:
    return Kin(task.pid, task.stat.session, task.stat.pgrp, [_kin(child) for child in task.children])
