# SPDX-License-Identifier: Apache-2.0
"""What of a stopped tree cannot be kept, apart from its memory's layout and its files."""

from __future__ import annotations

from stasis.linux import procfs, ptrace
from stasis.linux.kcmp import Kcmp, compare
from stasis.process.cgroups import check_groups
from stasis.process.dump.tasks import ns_pid
from stasis.process.findings import Findings
from stasis.process.fpu import lost_components
from stasis.process.kinship import Kin, unmakeable
from stasis.process.namespaces.own import check_namespaces
from stasis.process.seccomp import why_lost
from stasis.process.tree import Task, Tree

__all__ = ["check_tree"]

OBJECTS = {Kcmp.VM: "address space", Kcmp.FILES: "descriptor table", Kcmp.FS: "working directory",
           Kcmp.SIGHAND: "signal handlers"}  # fmt: skip
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
    for number, task in enumerate(living):
        _check_sharing(living[:number], task, findings)
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
        for lost in lost_components(ptrace.fpu_state(thread.tid)):
            findings.add(task.pid, where, f"images have no place for {lost}")
        for kind in (Kcmp.FILES, Kcmp.FS):
            if thread.tid != task.pid and compare(kind, task.pid, thread.tid):
                findings.add(task.pid, where, f"it has another {OBJECTS[kind]} than its process")


def _check_sharing(before: list[Task], task: Task, findings: Findings) -> None:
    for kind, name in OBJECTS.items():
        other = next((one for one in before if compare(kind, one.pid, task.pid) == 0), None)
        if other is not None:
            findings.add(task.pid, name, f"it is shared with process {other.pid}, which is not supported yet")


def _kin(task: Task) -> Kin:
    return Kin(task.pid, task.stat.session, task.stat.pgrp, [_kin(child) for child in task.children])
