# SPDX-License-Identifier: Apache-2.0
"""Making the processes of a tree: each one a child of its parent, with its pid, session, files and directories.

Every process is this program still, up to the moment in which the restorer seizes it and replaces its memory. What has
to be done by the process itself and can be done in Python is done here; then it waits.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import sys
from typing import Any, NoReturn

from stasis.errors import BusyError, PermissionDeniedError, StasisError, UnsupportedError
from stasis.linux import process
from stasis.linux.clone3 import fork_as
from stasis.process.dump.mm import VmaStatus
from stasis.process.files.opening import FileSet
from stasis.process.files.regular import open_by_entry
from stasis.process.restore.plan import TaskPlan

__all__ = ["Ready", "spawn"]

LARGEST_REPORT = 1 << 20


class Ready:
    """What a process told when it was ready: where in it the descriptors are that its memory is made from."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.pid = int(report["pid"])
        self.report_fd = int(report["report"])
        self.file_fd = {(int(number), int(flags)): int(fd) for number, flags, fd in report["files"]}

    @property
    def fds(self) -> list[int]:
        """All of them, to be closed in the end."""
        return [*self.file_fd.values(), self.report_fd]


def spawn(root: TaskPlan, files: FileSet) -> dict[int, Ready]:
    """Make all processes, the root as a child of ours; what each told, by pid. Zombies end at once.

    Raises StasisError; then none of them is left.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REPORT)
    pid = _fork(root.pid)
    if pid == 0:
        ours.close()
        _live(root, files, theirs, frozenset(plan.pid for plan in root.walk()), is_root=True)
    theirs.close()
    with ours:
        try:
            return _collect(ours, sum(not plan.is_zombie for plan in root.walk()))
        except BaseException:
            os.kill(pid, signal.SIGKILL)  # its children die with it, see _live
            os.waitpid(pid, 0)
            raise


def _collect(sock: socket.socket, count: int) -> dict[int, Ready]:
    found: dict[int, Ready] = {}
    while len(found) < count:
        message = sock.recv(LARGEST_REPORT)
        if not message:
            raise StasisError("a process ended before it was restored")
        report = json.loads(message)
        if "error" in report:
            raise StasisError.from_dict(report)
        found[int(report["pid"])] = Ready(report)
    return found


def _fork(pid: int) -> int:
    try:
        return fork_as(pid)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise BusyError(f"the pid {pid} is taken by {process.name(pid)}", errno=errno.EEXIST,
                            hint="end that process, or restore where the pid is free") from error  # fmt: skip
        if error.errno == errno.EPERM:
            raise PermissionDeniedError(
                "choosing the pid of a process needs CAP_CHECKPOINT_RESTORE", hint="run as root"
            ) from error
        raise UnsupportedError(f"the pid {pid} cannot be given: {error.strerror}", errno=error.errno or 0) from error


def _live(
    plan: TaskPlan, files: FileSet, report: socket.socket, pids: frozenset[int], *, is_root: bool
) -> NoReturn:
    """A process of the tree, until it is seized. Never returns."""
    try:
        process.set_parent_death_signal(signal.SIGKILL)  # taken back when it is restored
        if is_root:
            files.open_all(sorted({one.ids.files_id for one in plan.walk() if one.ids is not None}))
        if plan.entry.sid == plan.pid and os.getsid(0) != plan.pid:
            os.setsid()
        report = socket.socket(fileno=files.move(report.detach()))
        for child in plan.children:
            if _fork(child.pid) == 0:
                _live(child, files, report, pids, is_root=False)
        if plan.is_zombie:
            _end_as(plan)
        told = _prepare(plan, files, report.fileno(), pids)
        report.send(json.dumps(told).encode())
        while True:
            signal.pause()
    except StasisError as error:
        report.send(json.dumps({"message": str(error), **error.as_dict()}).encode())
    except OSError as error:
        failed = StasisError(f"process {plan.pid} cannot be made: {error}", errno=error.errno or 0)
        report.send(json.dumps(failed.as_dict()).encode())
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: {error!r} in the making of process {plan.pid}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_as(plan: TaskPlan) -> NoReturn:
    """End as a zombie did, with its status."""
    task = plan.core.tc
    status = 0 if task is None else task.exit_code
    if number := status & 0x7F:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(status >> 8 & 0xFF)


def _prepare(plan: TaskPlan, files: FileSet, report: int, pids: frozenset[int]) -> dict[str, Any]:
    assert plan.fs is not None
    assert plan.ids is not None
    assert plan.mm is not None
    if plan.entry.pgid != os.getpgid(0) and plan.entry.pgid in pids:
        os.setpgid(0, plan.entry.pgid)
    os.umask(plan.fs.umask or 0)
    os.chdir(files.map_path(files.file_name(plan.fs.cwd_id)))
    mapped = _open_mapped(plan, files)
    files.set_owners(plan.ids.files_id)
    files.place(plan.ids.files_id, [report, *(fd for _, _, fd in mapped)])
    return {"pid": os.getpid(), "report": report, "files": mapped}


def _open_mapped(plan: TaskPlan, files: FileSet) -> list[tuple[int, int, int]]:
    """(id, open flags, descriptor) of every file that the memory is made from, the program included."""
    assert plan.mm is not None
    of_file = VmaStatus.FILE_PRIVATE | VmaStatus.FILE_SHARED
    wanted = {(vma.shmid, vma.fdflags or 0) for vma in plan.mm.vmas if vma.status & of_file}
    wanted.add((plan.mm.exe_file_id, os.O_RDONLY))
    found = []
    for number, flags in sorted(wanted):
        entry = files.regular(number)
        found.append((number, flags, files.move(open_by_entry(entry, files.map_path(entry.name), flags))))
    return found
