# SPDX-License-Identifier: Apache-2.0
"""What is known of one tracer, as the registry keeps it and writes it to its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stasis.datto.layout import CACHE_DEFAULT
from stasis.datto.states import State

__all__ = ["FILES_REMEMBERED", "Target", "TracerRecord"]

FILES_REMEMBERED = 256
"""Of each series."""


@dataclass(frozen=True, slots=True)
class Target:
    """A device that a caller named: its path without links, what identifies it, its name if it is served."""

    path: str
    key: tuple[str, int, int]
    device: str | None


@dataclass(slots=True)
class TracerRecord:
    """One tracer. `cache` in bytes and `fallocated` in MiB are 0 for the default; `error` is 0 or a negative errno."""

    minor: int
    bdev: str
    cow: str
    state: State
    key: tuple[str, int, int]
    device: str | None = None
    error: int = 0
    reason: str = ""
    cache: int = 0
    fallocated: int = 0
    auto_expand: tuple[int, int] | None = None
    """Step and reserved space in MiB."""
    cow_size: int = 0
    seqid: int = 0
    uuid: str = ""
    version: int = 0
    changed: int = 0
    filled: int = 0
    taken: float = 0.0
    """When its snapshot was taken, in seconds since 1970."""
    finished: dict[str, str] = field(default_factory=dict)
    """Finished COW files of the series by their numbers."""
    own: dict[str, list[int]] = field(default_factory=dict)
    """What of the device belongs to COW files on it, by their numbers: offset and length in bytes by turns. Images do
    not show it."""
    trusted_from: int = 0
    """What changed since snapshots before this one is not relied on any more."""
    mark: tuple[str, int] | None = None
    """Generation and number of the snapshot in the change map of a live device; None for a served one."""
    resting: bool = False
    """Dormant while its device is served."""
    node: dict[str, Any] | None = None
    """The kernel node of its image, as the maker wants it back."""
    point: str = ""
    """File with what a live device's snapshot had in the blocks that changed before it."""

    @property
    def cache_size(self) -> int:
        """Bytes of memory for the index."""
        return self.cache or CACHE_DEFAULT

    def take(self, described: Mapping[str, Any]) -> None:
        """Enter what the worker says of the tracer."""
        for name in ("cow", "cow_size", "seqid", "uuid", "version", "changed", "filled"):
            if name in described:
                setattr(self, name, described[name])
        if described.get("own"):
            self.own = dict([*self.own.items(), (str(self.seqid), described["own"])][-FILES_REMEMBERED:])
        if "mode" in described and self.state.is_active:
            self.state = State.ACTIVE_SNAPSHOT if described["mode"] == "snapshot" else State.ACTIVE_INCREMENTAL
        if described.get("error") and not self.error:
            self.error, self.reason = int(described["error"]), str(described.get("reason") or "")

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TracerRecord:
        """KeyError, TypeError or ValueError if the fields are not those of a tracer."""
        expand, mark = fields.get("auto_expand"), fields.get("mark")
        return cls(**{**fields, "state": State(fields["state"]), "key": tuple(fields["key"]),
                      "auto_expand": tuple(expand) if expand else None, "mark": tuple(mark) if mark else None})
