# SPDX-License-Identifier: Apache-2.0
"""A restore into a pid namespace of its own: the pids of the images are free there, whoever has them outside.

The restore runs inside, as the first process of the namespace, in a mount namespace with a /proc of its own. It stays
as what takes up orphans, and ends when no process is left, with the status of the tree's first process. Whatever ends
it before ends everything inside: the kernel sees to that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from stasis.errors import PermissionDeniedError, StasisError
from stasis.linux import procfs
from stasis.linux.namespaces import CLONE_NEWNS, CLONE_NEWPID, fork_into_new, mount_proc

__all__ = ["clear_of", "outer_pids", "restore_inside"]

FAILED = 1
NS_LAST_PID, PID_MAX = Path("/proc/sys/kernel/ns_last_pid"), Path("/proc/sys/kernel/pid_max")
SIGNAL_EXIT = 128


def restore_inside(
    pids: Iterable[int], work: Callable[[], tuple[int, list[str]]]
) -> tuple[int, dict[int, int], list[str]]:
    """Have `work` done inside, which makes processes with `pids` and gives the first one's, and warnings.

    Returns the pid of the namespace's first process, a child of ours, the outer pids by the inner ones, and the
    warnings.
    """
    down, up = os.pipe(), os.pipe()
    try:
        init = fork_into_new(CLONE_NEWPID | CLONE_NEWNS)
    except PermissionError as error:
        raise PermissionDeniedError("a pid namespace needs CAP_SYS_ADMIN", hint="run as root") from error
    if init == 0:
        os.close(down[1])
        os.close(up[0])
        _live(list(pids), work, down[0], up[1])
    os.close(down[0])
    os.close(up[1])
    with open(up[0], "rb") as told, open(down[1], "wb"):
        report = told.readline()
        if not report:
            os.waitpid(init, 0)
            raise StasisError("the restore inside of the pid namespace ended without a word")
        answer = json.loads(report)
        if "error" in answer:
            os.waitpid(init, 0)
            raise StasisError.from_dict(answer)
        return init, outer_pids(init), answer["warnings"]


def outer_pids(init: int) -> dict[int, int]:
    """The pids of a process and all below it, by those of their pid namespace."""
    found: dict[int, int] = {}
    waiting = [init]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(ProcessLookupError):
            found[int(procfs.status(pid)["NSpid"].split()[-1])] = pid
            waiting += [child for tid in procfs.threads(pid) for child in procfs.children(pid, tid)]
    return found


def _live(pids: list[int], work: Callable[[], tuple[int, list[str]]], go_on: int, tell: int) -> NoReturn:
    status = FAILED
    try:
        os.setsid()
        mount_proc()
        NS_LAST_PID.write_text(str(clear_of(pids)))
        root, warnings = work()
        os.write(tell, json.dumps({"warnings": warnings}).encode() + b"\n")
        os.close(tell)
        os.read(go_on, 1)  # its end: the outer pids are known
        status = _watch(root)
    except StasisError as error:
        os.write(tell, json.dumps({"message": str(error), **error.as_dict()}).encode() + b"\n")
    except OSError as error:
        refused = StasisError(f"the pid namespace cannot be set up: {error}", errno=error.errno or 0)
        os.write(tell, json.dumps({"message": str(refused), **refused.as_dict()}).encode() + b"\n")
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: {error!r} in a pid namespace", file=sys.stderr, flush=True)
    os._exit(status)


def clear_of(pids: Iterable[int]) -> int:
    """A pid behind which there is room for helpers of the restore, whose pids nobody chooses."""
    limits = [1, *sorted(pids), int(PID_MAX.read_text())]
    _, start = max((after - before, before) for before, after in itertools.pairwise(limits))
    return start + 1


def _watch(root: int) -> int:
    """Be the parent of those that have none, until nobody is left."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    status = 0
    while True:
        try:
            pid, found = os.wait()
        except ChildProcessError:
            return status
        if pid == root:
            code = os.waitstatus_to_exitcode(found)
            status = code if code >= 0 else SIGNAL_EXIT - code
