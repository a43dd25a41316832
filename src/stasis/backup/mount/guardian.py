# SPDX-License-Identifier: Apache-2.0
"""The process that makes a block device of a served backup, mounts it, and gives both back in the end."""

from __future__ import annotations

import logging
import os
import select
import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from stasis.backup.mount import server
from stasis.backup.mount.channel import Channel, channels
from stasis.backup.mount.filesystem import mount_read_only, partition_node
from stasis.backup.mount.forking import fork, leave_session
from stasis.backup.mount.record import Process, Record
from stasis.backup.mount.takedown import is_mounted, take_apart_when_unused
from stasis.backup.repo import Repository
from stasis.backup.serve.opening import Wanted
from stasis.block import frontend
from stasis.errors import StasisError
from stasis.linux import process
from stasis.linux.eventloop import EPOLLIN, EventLoop

__all__ = ["run"]

log = logging.getLogger(__name__)

END_WAIT = 30.0
GONE = StasisError("the process that reads the repository ended before the backup was mounted")


def run(
    command: Channel,
    make_record: Callable[[], Record],
    wanted: Wanted,
    open_repository: Callable[[], Repository],
    partition: int | None,
) -> None:
    """Start the server, mount what it serves, tell the command, and watch over it until it is unmounted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the command tells by its end
    try:
        record = make_record()  # here and not in the command, which may be killed at once
    except (StasisError, OSError) as error:
        command.send(error=_as_stasis(error).as_dict())
        return
    ours, theirs = channels()

    def serve() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ours.close()
        command.close()
        server.run(theirs, record, wanted, open_repository)

    pid = fork(serve)
    theirs.close()
    # A fault in here ends us, and the server finds that out and takes over: it must not be told that all is done.
    _guard(command, ours, record.update(server=Process.of(pid)), partition)
    ours.send(end=True)
    _await_end(pid)


def _guard(command: Channel, served_by: Channel, record: Record, partition: int | None) -> None:
    served = served_by.receive() or {"error": GONE.as_dict()}
    if "error" in served:
        record.remove()
        command.send(**served)
        return
    leave_session(record.log)
    record = record.update(backup=served["backup"])
    outcome: dict[str, Any] = {}
    try:
        record, outcome = _mount(record, served, partition)
    except (StasisError, OSError) as error:
        outcome = {"error": _as_stasis(error).as_dict()}
    if "error" not in outcome and command.send(**outcome) and command.receive():
        _watch(record, served_by)
    take_apart_when_unused(record.reload() or record)
    if "error" in outcome:
        command.send(**outcome)


def _mount(record: Record, served: dict[str, Any], partition: int | None) -> tuple[Record, dict[str, Any]]:
    node = frontend.connect(served["uri"], served["size"], name=served["backup"][:12], directory=record.node_directory)
    record = record.update(node=node.state)
    mounted = mount_read_only(partition_node(node.path, partition), record.target)
    facts = {name: served[name] for name in ("backup", "device", "time")}
    return record, {"directory": record.target, "kind": node.kind, **facts, **asdict(mounted)}


def _as_stasis(error: StasisError | OSError) -> StasisError:
    if isinstance(error, StasisError):
        return error
    return StasisError(f"the backup cannot be mounted: {error}", errno=error.errno or 0)


def _watch(record: Record, server: Channel) -> None:
    """Wait until it is unmounted, the server ends, or we are told to end."""
    with open("/proc/self/mountinfo") as table, EventLoop() as loop:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.stop())
        # proc_pid_mounts(5): a change of the mounts shows as a priority event.
        loop.register(table.fileno(), select.EPOLLPRI, lambda _: None if is_mounted(record) else loop.stop())
        loop.register(server.fileno(), EPOLLIN, lambda _: loop.stop())
        if is_mounted(record):  # it may have been unmounted before we began to look
            loop.run()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # we are at it


def _await_end(pid: int) -> None:
    """Wait for the server, which has to give back its lock; not for ever, since the store may hang."""
    pidfd = process.pidfd_open(pid)  # it is our child and not waited for, so the pid is its own
    try:
        if not select.select([pidfd], [], [], END_WAIT)[0]:
            log.warning("the process that reads the repository (pid %d) does not end and is killed", pid)
            process.signal_pidfd(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    os.waitpid(pid, 0)
