# SPDX-License-Identifier: Apache-2.0
"""A snapshot in the registry and its file, RUN/snapshots/UUID/snapshot.json."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stasis.block.diffstorage import DiffStorage
from stasis.block.events import Event, EventQueue
from stasis.block.snapshot import SnapshotState, move
from stasis.daemon import statefile
from stasis.daemon.image import ImageServer
from stasis.errors import StateError

__all__ = ["RECORD", "Member", "Snapshot", "image_export"]

RECORD = "snapshot.json"

EVENTS_KEPT = 100
"""Events that outlive the daemon. A storage that grows to terabytes tells of it many thousand times."""


@dataclass
class Member:
    """One device of a snapshot: what was recorded when it was taken, and what became of it. Sizes in bytes."""

    name: str
    path: str
    size: int = 0
    chunk_shift: int = 0
    generation: str | None = None
    change_number: int | None = None
    wrapped: bool = False
    held_ns: int = 0
    error_code: int = 0
    """0, or the negative errno that corrupted the image of this device."""
    image_pid: int | None = None
    image_start_time: int | None = None
    tcp: tuple[str, int] | None = None
    node: dict[str, Any] | None = None
    """State of the image's kernel node, as its maker wants it back."""


@dataclass
class Snapshot:
    """One snapshot. `storage` is what the user named: a path, "memory", or "descriptor"."""

    id: str
    directory: Path
    storage: str
    limit: int | None = None
    chunk: int | None = None
    bitmaps: list[int] = field(default_factory=list)
    tcp: str | None = None
    tls_certificates: str | None = None
    tls_psk: str | None = None
    state: SnapshotState = SnapshotState.CREATED
    created: float = field(default_factory=time.time)
    taken: float | None = None
    hold_ns: int | None = None
    members: dict[str, Member] = field(default_factory=dict)
    events: EventQueue = field(default_factory=EventQueue)
    images: dict[str, ImageServer] = field(default_factory=dict)
    diff: DiffStorage | None = None

    @property
    def header_path(self) -> Path:
        return self.directory / "storage"

    def table_path(self, name: str) -> Path:
        return self.directory / f"{name}.chunks"

    @property
    def is_taken(self) -> bool:
        return self.state in (SnapshotState.TAKEN, SnapshotState.CORRUPTED)

    @property
    def error_code(self) -> int:
        """Error of the first device that has one, 0 if all images are good."""
        return next((member.error_code for member in self.members.values() if member.error_code), 0)

    def move(self, to: SnapshotState) -> None:
        """Go to another state and write that down. Raises StateError if the move is not allowed."""
        self.state = move(self.id, self.state, to)
        if to is not SnapshotState.DESTROYING:
            self.save()

    def save(self) -> None:
        """Write the registry entry; it ends with the boot, as the snapshot does."""
        skipped = ("directory", "members", "events", "images", "diff", "state")
        value = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in skipped}
        value["state"] = self.state.value
        value["members"] = [asdict(member) for member in self.members.values()]
        value["events"] = [event.as_dict() for event in self.events.events()[-EVENTS_KEPT:]]
        value["delivered"] = self.events.delivered()
        statefile.write(self.directory / RECORD, value)

    @classmethod
    def load(cls, directory: Path) -> Snapshot:
        """Read a registry entry; its storage is not opened. FileNotFoundError, StateError if it is damaged."""
        path = directory / RECORD
        value = statefile.read(path, f"remove {directory}")
        try:
            return cls._from(value, directory)
        except (TypeError, ValueError, KeyError) as error:
            raise StateError(f"the state file {path} is damaged: {error}", hint=f"remove {directory}") from error

    @classmethod
    def _from(cls, value: Mapping[str, Any], directory: Path) -> Snapshot:
        rest = dict(value)
        state = SnapshotState(rest.pop("state"))
        members = {entry["name"]: Member(**entry) for entry in rest.pop("members")}
        events = EventQueue((Event(**entry) for entry in rest.pop("events")), rest.pop("delivered", ()))
        if rest["id"] != directory.name:
            raise ValueError(f"it belongs to {rest['id']}")
        return cls(**rest, directory=directory, state=state, members=members, events=events)


def image_export(name: str, uuid: str) -> str:
    """Export name of an image: the device, `@`, and the first 8 digits of the snapshot's UUID."""
    return f"{name}@{uuid[:8]}"
