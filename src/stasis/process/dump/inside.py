# SPDX-License-Identifier: Apache-2.0
"""Dumps of trees in namespaces below ours: a worker enters them for the dumper.

Inside of a pid namespace the pids are those that the processes know of themselves, and the images get these. Network,
IPC and UTS namespaces are entered because the kernel tells of them only to those who live in them. The worker sees our
files, with a /proc for its pids. When the tree was all there is in the pid namespace, the kernel ends the worker with
it: what came of the dump is then read from the set.

There is one other case: a tree that a restore with --pid-namespace made has a first process that is not the first of
its pid namespace, and a mount namespace that only differs in its /proc. It is dumped from within both, as if it had
been outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from stasis.errors import PermissionDeniedError, StasisError
from stasis.linux import process, procfs
from stasis.linux.namespaces import CLONE_NEWNS, CLONE_NEWPID, FLAGS, enter, mount_proc, unshare
from stasis.process.dump.ids import Home
from stasis.process.findings import Finding
from stasis.process.helpers import work_inside
from stasis.process.images.imageset import ImageSet
from stasis.process.keeper import hand_over
from stasis.process.namespaces.identities import Identities
from stasis.process.roots import anchored

if TYPE_CHECKING:
    from stasis.process.dump.job import DumpResult
    from stasis.process.dump.tracking import Tracking

__all__ = ["Entering", "check_inside", "dump_inside", "entering", "watch_inside"]

FAILED = 1
PATIENCE = 10.0
ENTERED = ("net", "ipc", "uts")


class Entering(NamedTuple):
    """What a worker for a dump enters: CLONE_NEW* of namespaces; `anchored`: it reaches files through an anchor in the
    mount namespace, `translated`: users are numbered as in its user namespace."""

    flags: int
    anchored: bool = False
    translated: bool = False


def entering(pid: int) -> Entering | None:
    """For a dump of this process; None where it is done from where we are."""
    try:
        found = Entering(sum(FLAGS[name] for name in ENTERED if _differs(pid, name)), _differs(pid, "mnt"),
                         _differs(pid, "user"))  # fmt: skip
        if not _differs(pid, "pid"):
            return found if any(found) else None
        if _inner_pid(pid) == 1:
            return found._replace(flags=found.flags | CLONE_NEWPID)
        roots = [os.stat(f"/proc/{who}/root/") for who in (pid, "self")]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None  # told by whoever tries to trace it
    return Entering(CLONE_NEWPID | CLONE_NEWNS) if os.path.samestat(*roots) else None


def _differs(pid: int, name: str) -> bool:
    theirs, ours = (os.stat(f"/proc/{who}/ns/{name}") for who in (pid, "self"))
    return not os.path.samestat(theirs, ours)


def _inner_pid(pid: int) -> int:
    return int(procfs.status(pid)["NSpid"].split()[-1])


def check_inside(pid: int, way: Entering, look: Callable[[int], list[Finding]]) -> list[Finding]:
    """What `look`, called with the inner pid, finds."""
    found = _run(pid, way, lambda inner: [list(_fields(finding)) for finding in look(inner)])
    return [Finding(*fields) for fields in found or ()]


def _fields(finding: Finding) -> tuple[int, str, str, str, bool]:
    return finding.pid, finding.resource, finding.reason, finding.option, finding.passes


def dump_inside(
    pid: int, way: Entering, images: str | os.PathLike[str], work: Callable[[int, str], DumpResult], *,
    ends: bool = False, stops: bool = False, watched: bool = False,
) -> DumpResult:
    """What came of `work`, which dumps the inner pid into the directory; the process `ends` or `stops` with it. The
    pids of the result are the inner ones. `watched`: it knows what was written since a parent, or watches on."""
    from stasis.process.dump.job import DumpResult

    path = os.path.abspath(images)
    pidfd = process.pidfd_open(pid)
    try:
        run = watch_inside if watched else _run
        warnings = run(pid, way, lambda inner: work(inner, path).warnings)
        if ends:
            select.select([pidfd], [], [], PATIENCE)
        elif stops and way.flags & CLONE_NEWPID:  # the first process cannot be stopped from within
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    finally:
        os.close(pidfd)
    if warnings is None and not os.path.isdir(path):
        raise StasisError(f"the dump of process {pid} was killed", hint="nothing was changed")
    with ImageSet.open(path) as found:
        tasks = found.messages("pstree")
        stats = found.one("stats-dump").dump
        return DumpResult(
            os.fspath(images), [task.pid for task in tasks], sum(len(task.threads) for task in tasks),
            stats.pages_written, stats.freezing_time / 1e6, stats.frozen_time / 1e6, stats.memdump_time / 1e6,
            stats.pages_skipped_parent, warnings or [],
        )  # fmt: skip


def watch_inside(pid: int, way: Entering, work: Callable[[int], Any]) -> Any:
    """As `_run`, for work that takes what a keeper of the process has, and gives it to one: that lives out here, and so
    does not end up in the tree."""
    from stasis.process import keeper

    root = pid, procfs.stat(pid).start_time
    taken = keeper.take(root)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, contextlib.closing(taken):

        def begin() -> None:
            ours.close()
            keeper.work_inside(taken, theirs)

        def meanwhile() -> None:
            theirs.close()
            given.append(keeper.brought(ours))

        given: list[Tracking] = []
        try:
            found = _run(pid, way, work, begin, meanwhile)
            if found is not None and given[0].since:
                keeper.give(root, given[0])
        finally:
            for tracking in given:
                tracking.close()
    return found


def _run(
    pid: int, way: Entering, work: Callable[[int], Any], begin: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Any:
    """What `work`, called with the inner pid, returned within the namespaces of a process; None where it was killed.
    `begin` is called in the worker before, and `meanwhile` here."""
    inner = _inner_pid(pid) if way.flags & CLONE_NEWPID else pid
    reader, writer = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(reader)
        _enter(pid, way, lambda: _anchored(inner, way, work), writer, begin)
    os.close(writer)
    meanwhile()
    with open(reader, "rb") as told:
        report = told.readline()
    os.waitpid(helper, 0)
    if not report:
        return None
    answer = json.loads(report)
    if "error" in answer:
        raise StasisError.from_dict(answer)
    return answer["found"]


def _anchored(inner: int, way: Entering, work: Callable[[int], Any]) -> Any:
    if way.translated:
        Identities.use(inner)
    with anchored(inner) if way.anchored else contextlib.nullcontext():
        return work(inner)


def _enter(
    pid: int, way: Entering, work: Callable[[], Any], tell: int, begin: Callable[[], None]
) -> NoReturn:
    """A namespace of pids is that of processes that are made from then on: so another one does the work."""
    status = FAILED
    process.set_parent_death_signal(signal.SIGKILL)
    try:
        begin()
        where = os.getcwd()
        is_private = not way.flags & CLONE_NEWNS
        if is_private:
            Home.leave()
            unshare(CLONE_NEWNS)
        if way.flags:
            enter(pid, way.flags)
        os.chdir(where)
        worker = os.fork()
        if worker == 0:
            process.set_parent_death_signal(signal.SIGKILL)
            work_inside()
            if is_private and way.flags & CLONE_NEWPID:
                mount_proc()
            found = work()
            hand_over()
            os.write(tell, json.dumps({"found": found}).encode() + b"\n")
            os._exit(0)
        hand_over()
        os.close(tell)
        os.waitpid(worker, 0)
        status = 0
    except StasisError as error:
        _tell(tell, error)
    except PermissionError:
        _tell(tell, PermissionDeniedError(f"entering the namespaces of process {pid} needs CAP_SYS_ADMIN",
                                          hint="run as root"))  # fmt: skip
    except OSError as error:
        _tell(tell, StasisError(f"process {pid} cannot be dumped from within its namespace: {error}",
                                errno=error.errno or 0))  # fmt: skip
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: {error!r} in a pid namespace", file=sys.stderr, flush=True)
    os._exit(status)


def _tell(fd: int, error: StasisError) -> None:
    os.write(fd, json.dumps({"message": str(error), **error.as_dict()}).encode() + b"\n")
