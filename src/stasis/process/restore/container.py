# SPDX-License-Identifier: Apache-2.0
"""The restore of a tree whose first process is the first one of a pid namespace, as that of a container.

That process is made here, with the namespace, and waits. The restorer proper is a helper that enters the namespace,
so that the pids of the images are right for it; it sees our files, with a /proc for these pids, and has a pid that no
image has. It traces the first process: whatever ends the helper ends all inside. It ends itself when all runs, and is
nobody's child in there.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from stasis.errors import PermissionDeniedError, StasisError
from stasis.linux import process
from stasis.linux.clone3 import fork_as
from stasis.linux.namespaces import CLONE_NEWNS, CLONE_NEWPID, FLAGS, enter, fork_into_new, mount_proc, unshare
from stasis.process.namespaces.identities import Identities
from stasis.process.namespaces.imports import import_all
from stasis.process.namespaces.mounting import Copies
from stasis.process.namespaces.user import give_maps
from stasis.process.restore.namespace import NS_LAST_PID, clear_of, outer_pids
from stasis.process.restore.shared import make_shared

if TYPE_CHECKING:
    from stasis.process.restore.crew import Crew
    from stasis.process.restore.spawn import Nursery

__all__ = ["restore_first"]

FAILED = 1
PATIENCE = 2.0
FIRST = 1
"""The pid of the first process inside."""
Work = Callable[[int, Callable[[dict[str, Any]], None]], None]
"""Called in the helper with the outer pid of the first process, and what to call with that which is to be passed on,
before anything runs: a first process that ends at once takes the helper along."""
DONE = b"done\n"


def restore_first(nursery: Nursery, work: Work) -> tuple[dict[str, Any], dict[int, int]]:
    """Make the first process and have `work` done inside, which makes it and the others what they were.

    Returns what `work` did, and the outer pids by the inner ones. The first process is a child of ours.
    """
    crew = nursery.crew
    assert crew.root.ids is not None
    is_foreign = "user" in crew.own
    if is_foreign:
        _prepare(crew)
    started, told = os.pipe(), os.pipe()
    try:
        first = fork_into_new(CLONE_NEWPID | (FLAGS["user"] if is_foreign else 0))
    except PermissionError as error:
        raise PermissionDeniedError("a pid namespace needs CAP_SYS_ADMIN", hint="run as root") from error
    if first == 0:
        for fd in (started[1], *told):
            os.close(fd)
        nursery.be_first(started[0], is_foreign=is_foreign)
    os.close(started[0])
    try:
        if is_foreign:
            give_maps(first, crew.files.images, crew.root.ids.user_ns_id or 0)
        report = _have_helped(first, nursery, work, started[1], told)
    except BaseException:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        raise
    return report, {FIRST: first, **outer_pids(first)}


def _prepare(crew: Crew) -> None:
    """Have done what a first process in a user namespace of its own has no right to."""
    import_all()
    crew.shared_fd = make_shared(list(crew.root.walk()), crew.chain)
    for number in crew.apart.mounts if crew.apart.has_mounts or "mnt" in crew.own else ():
        crew.copies[number] = Copies.of(number, crew.files.images, crew.files.paths.outside)
    for images in crew.chain:
        images.keep()


def _have_helped(first: int, nursery: Nursery, work: Work, start: int, told: tuple[int, int]) -> dict[str, Any]:
    helper = os.fork()
    if helper == 0:
        os.close(told[0])
        _help(first, nursery, work, start, told[1])
    os.close(told[1])
    os.close(start)
    nursery.close()
    with open(told[0], "rb") as file:
        lines = file.readlines()
    os.waitpid(helper, 0)
    reports: list[dict[str, Any]] = [json.loads(line) for line in lines if line != DONE]
    for report in reports:
        if "error" in report:
            raise StasisError.from_dict(report)
    if not reports or (DONE not in lines and not _is_on_its_own(first)):
        raise StasisError("the restore inside of the pid namespace ended without a word")
    return reports[0]


def _is_on_its_own(first: int) -> bool:
    """Whether the first process runs without its helper, or came to an end of its own: with its tracer it would have
    been killed, or would be now."""
    pidfd = process.pidfd_open(first)
    try:
        select.select([pidfd], [], [], PATIENCE)
    finally:
        os.close(pidfd)
    found = os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return found is None or (found.si_code, found.si_status) != (os.CLD_KILLED, signal.SIGKILL)


def _help(first: int, nursery: Nursery, work: Work, start: int, tell: int) -> NoReturn:
    """A namespace of pids is that of processes that are made from then on: so another one does the work."""
    status = FAILED
    process.set_parent_death_signal(signal.SIGKILL)
    try:
        wanted = [tid for plan in nursery.crew.root.walk() for tid in plan.entry.threads]
        clear = clear_of(wanted)
        unshare(CLONE_NEWNS)
        enter(first, CLONE_NEWPID)
        worker = fork_as(clear)
        if worker == 0:
            process.set_parent_death_signal(signal.SIGKILL)
            mount_proc()
            NS_LAST_PID.write_text(str(clear))
            Identities.use(FIRST)
            os.write(start, b"s")
            os.close(start)
            work(first, lambda made: _write(tell, made))
            os.write(tell, DONE)
            os._exit(0)
        nursery.close()
        os.waitpid(worker, 0)
        status = 0
    except StasisError as error:
        _tell(tell, error)
    except OSError as error:
        _tell(tell, StasisError(f"the namespaces of the tree cannot be set up: {error}", errno=error.errno or 0))
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: {error!r} in a pid namespace", file=sys.stderr, flush=True)
    os._exit(status)


def _tell(fd: int, error: StasisError) -> None:
    _write(fd, {"message": str(error), **error.as_dict()})


def _write(fd: int, report: dict[str, Any]) -> None:
    os.write(fd, json.dumps(report).encode() + b"\n")
