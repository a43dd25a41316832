# SPDX-License-Identifier: Apache-2.0
"""What is shown of the devices and snapshots of kernel modules."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from stasis.daemon import maps, model, nodes
from stasis.daemon.driven.devices import DrivenDevice
from stasis.daemon.driven.snapshots import DrivenSnapshot
from stasis.daemon.paths import Directories
from stasis.daemon.snapshot import Member, image_export
from stasis.errors import StasisError
from stasis.nbd.uri import NbdUri

__all__ = ["device", "snapshot"]


def device(directories: Directories, shown: DrivenDevice, owner: DrivenSnapshot | None, *,
           detailed: bool) -> model.Device:
    """One device; `detailed` says which module tracks it."""
    numbers: dict[str, Any] = {}
    with contextlib.suppress(StasisError):
        numbers = maps.info(directories, shown.name)
    worker = {"driver": {"name": shown.driver.name, "version": shown.driver.version}} if shown.driver else None
    return model.Device(
        name=shown.name,
        path=shown.record.path,
        uri=Path(shown.record.path).as_uri(),
        size=shown.tracked.size,
        state="tracked" if shown.failure is None else "failed",
        error=str(shown.failure) if shown.failure else None,
        node=shown.record.path,
        snapshot=owner.id if owner else None,
        generation=numbers.get("generation"),
        change_number=numbers.get("change_number"),
        tracking_block=numbers.get("block_size"),
        worker=worker if detailed else None,
        driver=shown.record.driver,
    )


def snapshot(directories: Directories, shown: DrivenSnapshot) -> model.Snapshot:
    """One snapshot. A module does not tell how full its storage is."""
    return model.Snapshot(
        id=shown.id,
        state=shown.state.value,
        error_code=shown.error_code,
        created=shown.created,
        storage=model.Storage(path=shown.storage, kind=shown.driver, limit=shown.limit or 0),
        devices=[_member(directories, shown, member) for member in shown.members.values()],
        taken=shown.taken,
        hold_ns=shown.hold_ns,
    )


def _member(directories: Directories, shown: DrivenSnapshot, member: Member) -> model.SnapshotDevice:
    uri = NbdUri(export=image_export(member.name, shown.id),
                 socket=str(directories.nbd_socket(image_export(member.name, shown.id))))
    return model.SnapshotDevice(
        name=member.name,
        path=member.path,
        size=member.size,
        error_code=member.error_code,
        uri=str(uri) if shown.is_taken else None,
        tcp_uri=_tcp_uri(shown, member) if shown.is_taken else None,
        generation=member.generation,
        change_number=member.change_number,
        wrapped=member.wrapped,
        node=nodes.path_of(member.node),
    )


def _tcp_uri(shown: DrivenSnapshot, member: Member) -> str | None:
    if member.tcp is None:
        return None
    tls = shown.tls_certificates is not None or shown.tls_psk is not None
    return str(NbdUri(export=image_export(member.name, shown.id), host=member.tcp[0], port=member.tcp[1], tls=tls))
