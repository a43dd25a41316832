# SPDX-License-Identifier: Apache-2.0
"""`blksnap snapshot_create`, `snapshot_add`, `snapshot_take`, `snapshot_info`, `snapshot_collect`, `snapshot_destroy`.

A snapshot whose devices could not all be added is left behind, as blksnap leaves it: its UUID was printed before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stasis.blksnap.console.numbers import SECTOR, limit_sectors
from stasis.cli.blksnap.devices import attach_path
from stasis.cli.blksnap.session import Session, failing, open_device
from stasis.errors import PermissionDeniedError, StasisError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from stasis.daemon.model import Device, SnapshotDevice

__all__ = ["snapshot_add", "snapshot_collect", "snapshot_create", "snapshot_destroy", "snapshot_info", "snapshot_take"]

FIELDS = ("image", "error_code")
OURS = "stasis"
"""Driver of the devices that stasis serves itself; a kernel module freezes by itself what lies on its devices."""


def snapshot_create(session: Session) -> None:
    """Create a snapshot, print its UUID, then add the devices."""
    client = session.client
    path, limit = session.require("file"), limit_sectors(session.require("limit")) * SECTOR
    devices = session.values.get("device", [])
    first = _first_of_module(session, devices)
    with failing("Failed to create snapshot object."):
        if limit < 0:
            raise UsageError(f"a limit of {limit} bytes is none")
        os.stat(path)  # the daemon would make a file; here it must exist
        uuid = client.create_snapshot(path, first, limit=limit).id
    session.show({"id": uuid}, uuid)
    for device in devices[len(first) :]:
        _add(session, uuid, device)


def _first_of_module(session: Session, paths: Sequence[str]) -> list[str]:
    """Name of the first device if a kernel module tracks it: only its name tells that the snapshot is that module's."""
    if not paths or not os.path.exists(paths[0]):
        return []
    found = session.find(os.stat(paths[0]))
    return [] if found is None or found.driver == OURS else [found.name]


def snapshot_add(session: Session) -> None:
    """Add a device, attaching it first if it is not attached."""
    path, uuid = session.require("device"), session.require_uuid()
    device = _add(session, uuid, path)
    session.show({"id": uuid, "device": device.path})


def _add(session: Session, uuid: str, path: str) -> Device:
    status = open_device(path)
    _ = session.client
    with failing():
        device, _was_attached = attach_path(session, path, status)
        session.client.add(uuid, device.name)
    return device


def snapshot_take(session: Session) -> None:
    """Take the snapshot; mounted file systems rest meanwhile, so that their images are whole."""
    from stasis.live.atrest import file_systems_at_rest

    client = session.client
    uuid = session.require_uuid()
    with failing("Failed to take snapshot"):
        names = {device.name for device in client.snapshot(uuid).devices}
        nodes = [device.node for device in client.devices()
                 if device.name in names and device.node and device.driver == OURS]  # fmt: skip
        own = [str(client.directories.run), str(client.directories.state)]
        with file_systems_at_rest(nodes, own) as resting:
            taken = client.take(uuid)
    session.show({"id": uuid, "devices": [device.path for device in taken.devices], "frozen": resting})


def snapshot_destroy(session: Session) -> None:
    """Release a snapshot, whether or not its images are in use."""
    client = session.client
    uuid = session.require_uuid()
    with failing("Failed to destroy snapshot."):
        client.destroy(uuid)
    session.show({"id": uuid})


def snapshot_collect(session: Session) -> None:
    """Print the UUIDs of all snapshots."""
    client = session.client
    with failing("Failed to get list of active snapshots"):
        uuids = client.collect()
    session.show({"snapshots": uuids}, "".join(f"{uuid} \n" for uuid in uuids))


def snapshot_info(session: Session) -> None:
    """Print the state and the image of a device."""
    device = session.device(session.require("device"))
    fields = session.values.get("field", FIELDS)
    for field in fields:
        if field not in FIELDS:
            raise UsageError(f"Value '{field}' for argument '--field' is not supported.", hint=f"it is {FIELDS}")
    with failing():
        values = _info(session, device)
    if session.has("field"):
        session.show({fields[0]: values[fields[0]]}, str(values[fields[0]]))
    else:
        session.show(values, f"error_code={values['error_code']}", f"image={values['image']}")


def _info(session: Session, device: Device) -> dict[str, int | str]:
    """Error and image of a device; without a taken snapshot there is no image, and its name is empty."""
    member = None
    if device.snapshot is not None:
        member = session.client.snapshot(device.snapshot).device(device.name)
    if device.snapshot is None or member is None:
        return {"error_code": 0, "image": ""}
    return {"error_code": member.error_code, "image": _image(session, device.snapshot, member)}


def _image(session: Session, uuid: str, member: SnapshotDevice) -> str:
    """A node for the image where the host can make one, else its NBD URI."""
    if member.node or member.uri is None or member.error_code:
        return member.node or member.uri or ""
    try:
        return session.client.image_node(uuid, member.name)
    except (UnsupportedError, PermissionDeniedError):
        return member.uri
    except StasisError:
        lost = session.client.snapshot(uuid).device(member.name).error_code
        if lost:  # meanwhile, and its image cannot be opened any more
            return member.uri
        raise
