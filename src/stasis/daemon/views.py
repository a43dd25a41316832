# SPDX-License-Identifier: Apache-2.0
"""What is shown of devices and snapshots, put together from the registry, the maps and the workers."""

from __future__ import annotations

import contextlib
from typing import Any

from stasis.daemon import maps, model, nodes
from stasis.daemon.served import ServedDevice
from stasis.daemon.snapshot import Member, Snapshot, image_export
from stasis.daemon.snapshots import SnapshotKeeper
from stasis.errors import StasisError
from stasis.nbd.uri import NbdUri

__all__ = ["device", "snapshot"]


def device(keeper: SnapshotKeeper, shown: ServedDevice, *, detailed: bool = False) -> model.Device:
    """One device; `detailed` asks its worker for counters."""
    numbers: dict[str, Any] = {}
    with contextlib.suppress(StasisError):
        numbers = maps.info(keeper.directories, shown.name)
    trouble = shown.trouble
    return model.Device(
        name=shown.name,
        path=shown.record.path,
        uri=shown.uri,
        size=shown.size,
        state="serving" if shown.channel is not None and trouble is None else "failed",
        error=str(trouble) if trouble else None,
        tcp_uri=shown.tcp_uri,
        node=nodes.path_of(shown.node),
        snapshot=keeper.snapshot_of(shown.name),
        generation=numbers.get("generation"),
        change_number=numbers.get("change_number"),
        tracking_block=numbers.get("block_size"),
        buffered=shown.record.buffered,
        pid=shown.child.pid if shown.child else None,
        worker=_worker(shown) if detailed else None,
    )


def _worker(shown: ServedDevice) -> dict[str, Any] | None:
    if shown.channel is None:
        return None
    answer = shown.channel.call("info")
    return {name: value for name, value in answer.items() if name != "ok"}


def snapshot(keeper: SnapshotKeeper, shown: Snapshot) -> model.Snapshot:
    """One snapshot with its devices and the fill level of its storage."""
    return model.Snapshot(
        id=shown.id,
        state=shown.state.value,
        error_code=shown.error_code,
        created=shown.created,
        storage=_storage(shown),
        devices=[_member(keeper, shown, member) for member in shown.members.values()],
        taken=shown.taken,
        hold_ns=shown.hold_ns,
    )


def _storage(shown: Snapshot) -> model.Storage:
    if shown.diff is None:
        return model.Storage(path=shown.storage, kind="lost")
    return model.Storage(path=shown.storage, **shown.diff.fill().as_dict())


def _member(keeper: SnapshotKeeper, shown: Snapshot, member: Member) -> model.SnapshotDevice:
    return model.SnapshotDevice(
        name=member.name,
        path=member.path,
        size=member.size,
        error_code=member.error_code,
        uri=keeper.images.uri(shown, member),
        tcp_uri=_tcp_uri(shown, member) if shown.is_taken else None,
        generation=member.generation,
        change_number=member.change_number,
        wrapped=member.wrapped,
        chunk=1 << member.chunk_shift if member.chunk_shift else 0,
        held_ns=member.held_ns,
        node=nodes.path_of(member.node),
    )


def _tcp_uri(shown: Snapshot, member: Member) -> str | None:
    if member.tcp is None:
        return None
    host, port = member.tcp
    tls = shown.tls_certificates is not None or shown.tls_psk is not None
    return str(NbdUri(export=image_export(member.name, shown.id), host=host, port=port, tls=tls))
