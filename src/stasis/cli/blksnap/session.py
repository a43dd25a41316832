# SPDX-License-Identifier: Apache-2.0
"""What the commands share: their options, the connection to the daemon, devices by path, and errors as texts.

Nothing of the daemon is imported before it is called, so that help and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stasis.errors import ExitCode, NotFoundError, StasisError, UsageError

if TYPE_CHECKING:
    from stasis.daemon.client import Client
    from stasis.daemon.model import Device

__all__ = ["NOBODY", "Session", "device_number", "explain", "failing", "open_device"]

NOBODY = "00000000-0000-0000-0000-000000000000"
"""What a text that is no UUID is taken for, as the tool does: no snapshot has it."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)


class Session:
    """One run of the tool."""

    def __init__(self) -> None:
        self.values: dict[str, list[str]] = {}
        self._client: Client | None = None

    # -- options ----------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the option was given."""
        return name in self.values

    @property
    def as_json(self) -> bool:
        return self.has("json")

    def require(self, name: str) -> str:
        """The value of an option without which the command makes no sense."""
        return self.require_all(name)[0]

    def require_all(self, name: str) -> list[str]:
        """All values of such an option."""
        if not self.has(name):
            raise UsageError(f"Argument '{name}' is missed.", hint=f"give it with --{name}")
        return self.values[name]

    def require_uuid(self) -> str:
        """The snapshot that --id names."""
        text = self.require("id")
        return text.lower() if _UUID.fullmatch(text) else NOBODY

    # -- results ----------------------------------------------------------------------------------

    def show(self, value: dict[str, Any], *lines: str) -> None:
        """Print a result: as one line of JSON, or as the tool's lines."""
        for line in [json.dumps(value)] if self.as_json else lines:
            print(line, flush=True)

    # -- the daemon -------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """The connection, which is the tool's control node. One that cannot be had is told as a missing node is."""
        if self._client is None:
            from stasis.daemon import client, paths

            directories = paths.resolve()
            with failing(str(directories.control_socket)):
                self._client = client.connect()
        return self._client

    def close(self) -> None:
        """End the connection, if there is one."""
        if self._client is not None:
            self._client.close()

    def find(self, status: os.stat_result) -> Device | None:
        """The device whose origin or node this is."""
        return next((device for device in self.client.devices() if _is_of(device, status)), None)

    def device(self, path: str) -> Device:
        """The device at a path. NotFoundError with ENOENT where nothing is attached, as the kernel answers."""
        status = open_device(path)
        _ = self.client
        with failing():
            found = self.find(status)
        if found is None:
            raise NotFoundError(os.strerror(errno.ENOENT), hint=f"{path} is not attached", exit_code=ExitCode.FAILURE)
        return found


def _is_of(device: Device, status: os.stat_result) -> bool:
    return any(_same(path, status) for path in (device.path, device.node) if path)


def _same(path: str, status: os.stat_result) -> bool:
    try:
        other = os.stat(path)
    except OSError:
        return False
    if stat.S_ISBLK(status.st_mode) or stat.S_ISBLK(other.st_mode):
        return (stat.S_IFMT(status.st_mode), status.st_rdev) == (stat.S_IFMT(other.st_mode), other.st_rdev)
    return os.path.samestat(status, other)


def device_number(device: Device) -> str:
    """MAJOR:MINOR of the origin, or of the node if the origin is a file; 0:0 without either."""
    for path in (device.path, device.node):
        try:
            status = os.stat(path or "")
        except OSError:
            continue
        if stat.S_ISBLK(status.st_mode):
            return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return "0:0"


def open_device(path: str) -> os.stat_result:
    """What a device is, by opening it as the tool does: to read, and directly unless it is an image file.

    Raises the tool's sentence if it cannot be opened, ENOTTY if it is neither block device nor image file.
    """
    try:
        direct = 0 if stat.S_ISREG(os.stat(path).st_mode) else os.O_DIRECT
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | direct)
    except OSError as error:
        raise _failure(f"Failed to open block device [{path}]", error.errno or 0, str(error)) from error
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not (stat.S_ISBLK(status.st_mode) or stat.S_ISREG(status.st_mode)):
        raise _failure("", errno.ENOTTY, f"{path} is neither a block device nor an image file")
    return status


@contextlib.contextmanager
def failing(what: str = "") -> Iterator[None]:
    """Put an error into the tool's words: `what`, a colon, and the text of its errno; or that text alone."""
    try:
        yield
    except StasisError as error:
        raise explain(error, what) from error
    except OSError as error:
        raise _failure(what, error.errno or 0, str(error)) from error


def explain(error: StasisError, what: str = "") -> StasisError:
    """The error in the tool's words; its own go into the hint."""
    own = f"{error.message} ({error.hint})" if error.hint else error.message
    return _failure(what, error.errno, own)


def _failure(what: str, number: int, own: str) -> StasisError:
    reason = os.strerror(number) if number else own
    return StasisError(f"{what}: {reason}" if what else reason, hint=own, errno=number)
