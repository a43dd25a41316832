# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet: one sentence, a hint, an exit code and an errno.

The same object travels from a worker or the daemon to the command line as a dictionary (`as_dict`,
`from_dict`), so that a message is written once, where the cause is known. The table of exit codes in
`docs/guide/exit-codes.md` is checked against `ExitCode` by a test.
"""

from __future__ import annotations

import errno as _errno
from enum import IntEnum
from typing import Any, Mapping

__all__ = [
    "BusyError",
    "DaemonError",
    "DamagedError",
    "ExitCode",
    "GenerationError",
    "LockedError",
    "NotFoundError",
    "PassphraseError",
    "PermissionDeniedError",
    "RepositoryError",
    "StasisError",
    "StateError",
    "StorageError",
    "UnsupportedError",
    "UsageError",
    "VerifyError",
]


class ExitCode(IntEnum):
    """Exit status of every command. A number, once given a meaning, keeps it."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    BUSY = 4
    PERMISSION = 5
    STORAGE = 6
    GENERATION = 7
    VERIFY = 8
    DAEMON = 9
    STATE = 10
    UNSUPPORTED = 11
    PARTIAL = 12
    REPOSITORY = 13
    LOCKED = 14
    PASSPHRASE = 15
    TRACKING = 16
    DAMAGED = 17
    INTERRUPTED = 130


class StasisError(Exception):
    """A failure told to the user: `message` says what failed, `hint` what to do about it.

    `errno` is the positive error number of the call that failed, 0 where none did. A subclass gives the
    exit code and the usual errno of its kind; both can be overridden per error.
    """

    default_exit_code = ExitCode.FAILURE
    default_errno = 0

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        exit_code: ExitCode | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = self.default_exit_code if exit_code is None else exit_code
        self.errno = self.default_errno if errno is None else errno

    def __str__(self) -> str:
        return self.message

    def as_dict(self) -> dict[str, str | int]:
        """The error as plain values for JSON and varlink; `from_dict` is the inverse."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "exit_code": int(self.exit_code),
            "errno": self.errno,
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> StasisError:
        """The error that `as_dict` described; a kind unknown to this version becomes a plain failure."""
        kind = _KINDS.get(str(fields.get("error", "")), StasisError)
        try:
            exit_code = ExitCode(int(fields.get("exit_code", kind.default_exit_code)))
        except ValueError:
            exit_code = ExitCode.FAILURE
        return kind(
            str(fields.get("message", "unknown error")),
            hint=str(fields.get("hint", "")),
            exit_code=exit_code,
            errno=int(fields.get("errno", 0)),
        )


class UsageError(StasisError):
    """An argument that cannot be understood or is out of range."""

    default_exit_code = ExitCode.USAGE
    default_errno = _errno.EINVAL


class NotFoundError(StasisError):
    """A device, snapshot, file or filter that does not exist."""

    default_exit_code = ExitCode.NOT_FOUND
    default_errno = _errno.ENOENT


class BusyError(StasisError):
    """Something that is mounted, held, attached or in a snapshot already."""

    default_exit_code = ExitCode.BUSY
    default_errno = _errno.EBUSY


class PermissionDeniedError(StasisError):
    """The user may not do this."""

    default_exit_code = ExitCode.PERMISSION
    default_errno = _errno.EACCES


class StorageError(StasisError):
    """Difference storage that is unusable, too small, misplaced or full."""

    default_exit_code = ExitCode.STORAGE
    default_errno = _errno.ENOSPC


class GenerationError(StasisError):
    """A change number of another generation: what changed since then is not known."""

    default_exit_code = ExitCode.GENERATION
    default_errno = _errno.ESTALE


class VerifyError(StasisError):
    """Bytes that should be equal are not."""

    default_exit_code = ExitCode.VERIFY
    default_errno = _errno.EIO


class DaemonError(StasisError):
    """The daemon or a worker cannot be started or reached."""

    default_exit_code = ExitCode.DAEMON
    default_errno = _errno.ECONNREFUSED


class StateError(StasisError):
    """A state file that cannot be read, or a move that the life cycle does not allow."""

    default_exit_code = ExitCode.STATE
    default_errno = _errno.EINVAL


class UnsupportedError(StasisError):
    """The host, kernel or Python lacks what this needs."""

    default_exit_code = ExitCode.UNSUPPORTED
    default_errno = _errno.EOPNOTSUPP


class RepositoryError(StasisError):
    """No backup repository there, or one that this version cannot use."""

    default_exit_code = ExitCode.REPOSITORY
    default_errno = _errno.ENOENT


class LockedError(StasisError):
    """Somebody else holds a lock of the repository, or runs the same set."""

    default_exit_code = ExitCode.LOCKED
    default_errno = _errno.EAGAIN


class PassphraseError(StasisError):
    """No passphrase or key file, or one that opens none of the repository's keys."""

    default_exit_code = ExitCode.PASSPHRASE
    default_errno = _errno.EACCES


class DamagedError(StasisError):
    """An object of a repository, or a file of an image set: missing, cut off or altered. The message names it."""

    default_exit_code = ExitCode.DAMAGED
    default_errno = _errno.EBADMSG


_KINDS: dict[str, type[StasisError]] = {
    kind.__name__: kind
    for kind in (
        StasisError,
        UsageError,
        NotFoundError,
        BusyError,
        PermissionDeniedError,
        StorageError,
        GenerationError,
        VerifyError,
        DaemonError,
        StateError,
        UnsupportedError,
        RepositoryError,
        LockedError,
        PassphraseError,
        DamagedError,
    )
}
