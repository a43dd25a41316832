# SPDX-License-Identifier: Apache-2.0
"""Dumps of trees in a pid namespace below ours, as a restore with --pid-namespace makes them: the dumper enters it.

Inside the pids are those that the processes know of themselves, and the images get these. A helper enters the pid and
the mount namespace and does the work there; it is this program still, so the file system must be ours. When the tree
was all there is in the namespace, the kernel ends the helper with it: what came of the dump is then read from the set.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from stasis.errors import PermissionDeniedError, StasisError
from stasis.linux import process, procfs
from stasis.linux.namespaces import CLONE_NEWNS, CLONE_NEWPID, enter
from stasis.process.errors import refusal
from stasis.process.findings import Finding
from stasis.process.images.imageset import ImageSet

if TYPE_CHECKING:
    from stasis.process.dump.job import DumpOptions, DumpResult

__all__ = ["check_inside", "dump_inside", "is_inside"]

FAILED = 1


def is_inside(pid: int) -> bool:
    """Whether a process is in another pid namespace than we are, and sees our files."""
    try:
        theirs, ours = (os.stat(f"/proc/{who}/ns/pid") for who in (pid, "self"))
        roots = [os.stat(f"/proc/{who}/root/") for who in (pid, "self")]
    except FileNotFoundError as error:
        if os.path.exists(f"/proc/{pid}"):
            return False  # its first thread has ended, which the dump says better
        raise refusal(pid, ProcessLookupError(error.errno, error.strerror)) from error
    except PermissionError:
        return False  # told by whoever tries to trace it
    return not os.path.samestat(theirs, ours) and os.path.samestat(*roots)


def check_inside(pid: int, **options: Any) -> list[Finding]:
    """As `job.check`, from within."""
    from stasis.process.dump.job import check

    found = _run(pid, lambda inner: [list(_fields(finding)) for finding in check(inner, **options)])
    return [Finding(*fields) for fields in found or ()]


def _fields(finding: Finding) -> tuple[int, str, str, str, bool]:
    return finding.pid, finding.resource, finding.reason, finding.option, finding.passes


def dump_inside(pid: int, images: str | os.PathLike[str], options: DumpOptions) -> DumpResult:
    """As `job.dump`, from within. The pids of the result are the inner ones."""
    from stasis.process.dump.job import DumpResult, dump

    path = os.path.abspath(images)
    warnings = _run(pid, lambda inner: dump(inner, path, options).warnings)
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


def _run(pid: int, work: Callable[[int], Any]) -> Any:
    """What `work`, called with the inner pid, returned within the namespaces of a process; None where it was killed."""
    inner = int(procfs.status(pid)["NSpid"].split()[-1])
    reader, writer = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(reader)
        _enter(pid, inner, work, writer)
    os.close(writer)
    with open(reader, "rb") as told:
        report = told.readline()
    os.waitpid(helper, 0)
    if not report:
        return None
    answer = json.loads(report)
    if "error" in answer:
        raise StasisError.from_dict(answer)
    return answer["found"]


def _enter(pid: int, inner: int, work: Callable[[int], Any], tell: int) -> NoReturn:
    """A namespace of pids is that of processes that are made from then on: so another one does the work."""
    status = FAILED
    try:
        where = os.getcwd()
        enter(pid, CLONE_NEWPID | CLONE_NEWNS)
        os.chdir(where)
        worker = os.fork()
        if worker == 0:
            process.set_parent_death_signal(signal.SIGKILL)
            os.write(tell, json.dumps({"found": work(inner)}).encode() + b"\n")
            os._exit(0)
        os.close(tell)
        os.waitpid(worker, 0)
        status = 0
    except StasisError as error:
        _tell(tell, error)
    except PermissionError:
        _tell(tell, PermissionDeniedError("entering a pid namespace needs CAP_SYS_ADMIN", hint="run as root"))
    except OSError as error:
        _tell(tell, StasisError(f"process {pid} cannot be dumped from within its namespace: {error}",
                                errno=error.errno or 0))  # fmt: skip
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: {error!r} in a pid namespace", file=sys.stderr, flush=True)
    os._exit(status)


def _tell(fd: int, error: StasisError) -> None:
    os.write(fd, json.dumps({"message": str(error), **error.as_dict()}).encode() + b"\n")
