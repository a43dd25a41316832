# SPDX-License-Identifier: Apache-2.0
"""`blksnap attach` and `blksnap detach`, and attaching as `snapshot_add` does it by itself."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from stasis.cli.blksnap.session import Session, failing, open_device
from stasis.errors import BusyError, NotFoundError, PermissionDeniedError, StasisError, UnsupportedError

if TYPE_CHECKING:
    from stasis.daemon.model import Device

__all__ = ["attach", "attach_path", "detach"]

NAME_LENGTH = 63


def attach(session: Session) -> None:
    """Attach a device, with a node under /dev where the host can make one. Twice is no error."""
    path = session.require("device")
    status = open_device(path)
    _ = session.client
    with failing("Failed to attach filter to the block device"):
        device, was_attached = attach_path(session, path, status)
    said = "Already was attached" if was_attached else "Attached successfully"
    session.show({"device": device.path, "name": device.name, "node": device.node, "uri": device.uri,
                  "already_attached": was_attached}, said)  # fmt: skip


def attach_path(session: Session, path: str, status: os.stat_result) -> tuple[Device, bool]:
    """The device at a path, and whether it was attached before. Raises what the daemon raises."""
    found = session.find(status)
    if found is not None:
        # One that could not be served when the daemon started is tried again: nobody tracks it otherwise.
        return (session.client.refresh(found.name) if found.state == "failed" else found), True
    try:
        return _attach_new(session, os.path.realpath(path)), False
    except StasisError as error:
        found = session.find(status) if error.errno == errno.EALREADY else None
        if found is None:
            raise
        return found, True


def _attach_new(session: Session, path: str) -> Device:
    """Serve it, or, if it is in use and blksnap's module is there, have that track it where it is."""
    name = _free_name(session, path)
    try:
        return _serve(session, path, name)
    except BusyError as busy:
        if busy.errno == errno.EBUSY:
            with contextlib.suppress(StasisError):
                return session.client.attach(path, name=name, driver="blksnap")
        raise


def _serve(session: Session, path: str, name: str) -> Device:
    try:
        return session.client.attach(path, name=name, kernel=True)
    except (UnsupportedError, PermissionDeniedError):
        # No node for this user or on this host: the NBD URI is what there is. A device that may not be opened
        # says so again.
        return session.client.attach(path, name=name)


def _free_name(session: Session, path: str) -> str:
    """A name for the device that no other one has: two images in two directories may be called alike."""
    from stasis.daemon.record import default_name

    taken = {device.name for device in session.client.devices()}
    name, number = default_name(path), 1
    base = name
    while name in taken:
        number += 1
        suffix = f"-{number}"
        name = base[: NAME_LENGTH - len(suffix)] + suffix
    return name


def detach(session: Session) -> None:
    """Detach a device and forget its changes, as they are not tracked from here on.

    A snapshot that it is in loses its image: blksnap would go on showing it while nothing protects it any more.
    """
    path = session.require("device")
    status = open_device(path)
    _ = session.client
    with failing("Failed to detach filter from the block device"):
        found = session.find(status)
        if found is None:
            raise NotFoundError(f"{path} is not attached")
        session.client.detach(found.name, force=True, forget=True)
    session.show({"device": found.path, "name": found.name})
