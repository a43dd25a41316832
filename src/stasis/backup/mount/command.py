# SPDX-License-Identifier: Apache-2.0
"""Mounting and unmounting a backup, as the command line and other programs ask for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from errno import EACCES, EBUSY, EEXIST, ENOTEMPTY, EPERM
from pathlib import Path

from stasis.backup.mount import guardian, takedown
from stasis.backup.mount.channel import Channel, channels
from stasis.backup.mount.forking import fork
from stasis.backup.mount.record import Record
from stasis.backup.repo import Repository
from stasis.backup.serve.opening import Wanted
from stasis.block import frontend
from stasis.block.frontend.node import wait_until
from stasis.errors import BusyError, NotFoundError, PermissionDeniedError, StasisError, UnsupportedError, UsageError

__all__ = ["Mounted", "make_record", "mount", "umount"]

END_WAIT = 60.0


@dataclass(frozen=True)
class Mounted:
    """A mounted backup. `type` is the file system's; `kind` says how the block device `node` was made; `replayed`:
    whether the journal was replayed into scratch space, if there was something in it."""

    directory: str
    backup: str
    device: str
    time: str
    node: str
    kind: str
    type: str
    options: str
    replayed: bool


def mount(
    directory: str,
    wanted: Wanted,
    open_repository: Callable[[], Repository],
    *,
    run_dir: Path,
    partition: int | None = None,
) -> Mounted:
    """Mount a backup read-only; it stays mounted after the process at hand has ended, until `umount` or umount(8).

    Two processes are forked off, so the caller must have no threads; `open_repository` is called in one of them.
    Raises what opening the repository and the backup raise, NotFoundError, UsageError and BusyError about the
    directory, PermissionDeniedError, and UnsupportedError when this host or the backup cannot be mounted.
    """
    target = _target(directory)
    _check_host()
    ours, theirs = channels()

    def guard() -> None:
        ours.close()
        guardian.run(theirs, lambda: make_record(run_dir, target), wanted, open_repository, partition)

    pid = fork(guard)
    theirs.close()
    try:
        return _outcome(ours, target)
    except BaseException:
        ours.close()  # nobody is there any more to be told: the guardian gives everything back
        os.waitpid(pid, 0)
        raise
    finally:
        ours.close()


def _outcome(channel: Channel, target: str) -> Mounted:
    outcome = channel.receive()
    if outcome is None:
        raise StasisError(f"the process that mounts the backup on {target} was killed", hint="try again")
    if "error" in outcome:
        raise StasisError.from_dict(outcome["error"])
    channel.send(taken=True)
    return Mounted(**outcome)


def _target(directory: str) -> str:
    try:
        with os.scandir(directory) as entries:
            occupied = next(entries, None) is not None
    except FileNotFoundError as error:
        raise NotFoundError(f"{directory} does not exist", hint="make the directory first") from error
    except NotADirectoryError as error:
        raise UsageError(f"{directory} is no directory", hint="name an empty directory") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{directory} cannot be looked into: {error.strerror}") from error
    if os.path.ismount(directory):
        raise BusyError(f"something is mounted on {directory} already", hint="name another directory")
    if occupied:
        raise UsageError(f"{directory} is not empty", hint="name an empty directory; its contents would be hidden")
    return os.path.realpath(directory)


def _check_host() -> None:
    if os.geteuid():
        raise PermissionDeniedError("only root can mount a backup",
                                    hint="run it as root, or read the backup through stasis backup serve")
    if not frontend.probe():
        raise UnsupportedError(frontend.NOTHING_TO_USE, hint=frontend.WHAT_TO_INSTALL)


def make_record(run_dir: Path, target: str) -> Record:
    """A new record for a directory, in place of what a mount left that nobody watches. BusyError."""
    new = Record.of(run_dir, target)
    old = Record.load(run_dir, target) or new  # a directory without a record is one that somebody was removing
    if _running(old):
        raise BusyError(f"a backup is being mounted on {target}, or unmounted from there", hint="try again later")
    _take_apart(old)
    try:
        return new.create()
    except OSError as error:
        if error.errno not in (EEXIST, ENOTEMPTY):
            raise
        raise BusyError(f"another command mounts a backup on {target}", hint="try again later") from error


def _running(record: Record) -> bool:
    return any(one is not None and one.runs() for one in (record.guardian, record.server))


def umount(directory: str, *, run_dir: Path) -> None:
    """Unmount a backup, and return when all that carried it is gone.

    Raises NotFoundError if no backup is mounted there, BusyError while the file system is in use.
    """
    target = os.path.realpath(directory)
    record = Record.load(run_dir, target)
    if record is None:
        raise NotFoundError(f"no backup is mounted on {directory}", hint="umount unmounts everything else")
    if not _running(record):
        _take_apart(record)
        return
    _unmount(record)
    if not wait_until(lambda: not _running(record), END_WAIT):
        raise BusyError(f"the device of the backup on {directory} is still in use",
                        hint="it is given back when the last program that uses it ends")


def _unmount(record: Record) -> None:
    try:
        takedown.unmount(record, lazily=False)
    except OSError as error:
        if error.errno == EBUSY:
            raise BusyError(f"{record.target} is in use",
                            hint=f"end what uses it and try again; fuser -vm {record.target} shows it") from error
        if error.errno in (EPERM, EACCES):
            raise PermissionDeniedError(f"{record.target} cannot be unmounted", hint="run it as root") from error
        raise


def _take_apart(record: Record) -> None:
    """What both processes left that were killed at once."""
    _unmount(record)
    takedown.take_apart(record)
