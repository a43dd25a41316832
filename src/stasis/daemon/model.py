# SPDX-License-Identifier: Apache-2.0
"""What the control API tells of devices, snapshots and maps: the same objects in Python, in varlink and in JSON.

The types of org.stasis.varlink are these; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from stasis.block.events import Event

__all__ = ["Device", "Event", "Extent", "MapInfo", "Snapshot", "SnapshotDevice", "Status", "Storage", "Tracer",
           "from_dict"]

T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """An attached device. Sizes in bytes.

    `uri` is where it is served; that of a device of a kernel module, whose I/O stays in the kernel, is "file:" and its
    path.

    `state` is "serving", "tracked" by a kernel module, or "failed" with the reason in `error`; `node` is its block
    device in the kernel, if it has one; `snapshot` the snapshot it is in; `change_number` the number of its last
    snapshot within `generation`.
    """

    name: str
    path: str
    uri: str
    size: int
    state: str
    error: str | None = None
    tcp_uri: str | None = None
    node: str | None = None
    snapshot: str | None = None
    generation: str | None = None
    change_number: int | None = None
    tracking_block: int | None = None
    buffered: bool = False
    pid: int | None = None
    worker: dict[str, Any] | None = None
    """What the worker tells of itself: counters of I/O and of copy-on-write (`device show` only)."""
    driver: str = "stasis"
    """Who tracks it: "stasis", which serves it, or a kernel module, "blksnap" or "dattobd"."""


@dataclass(frozen=True)
class Storage:
    """Difference storage and how full it is, in bytes.

    `filled` is in use, `requested` may be used without growing further, `capacity` is allocated, `limit` the most there
    will be, `portion` by how much it grows; `no_space` tells that it has reached the limit.
    """

    path: str
    kind: str
    filled: int = 0
    requested: int = 0
    capacity: int = 0
    limit: int = 0
    portion: int = 0
    no_space: bool = False


@dataclass(frozen=True)
class SnapshotDevice:
    """One device of a snapshot. `uri` is that of its image, once taken; `error_code` a negative errno or 0.

    `node` is the image's kernel block device, if one was asked for.

    `generation` and `change_number` name the epoch that the snapshot ended; `chunk` is in bytes, `held_ns` how long the
    device's writes were held.
    """

    name: str
    path: str
    size: int
    error_code: int = 0
    uri: str | None = None
    tcp_uri: str | None = None
    generation: str | None = None
    change_number: int | None = None
    wrapped: bool = False
    chunk: int = 0
    held_ns: int = 0
    node: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A snapshot. `state` is "created", "taking", "taken" or "corrupted"; times are seconds since 1970.

    `error_code` is that of the first device that has one; `hold_ns` how long the take held writes, over all devices.
    """

    id: str
    state: str
    error_code: int
    created: float
    storage: Storage
    devices: list[SnapshotDevice] = field(default_factory=list)
    taken: float | None = None
    hold_ns: int | None = None

    def device(self, name: str) -> SnapshotDevice:
        """The device of this name. KeyError if it is not in the snapshot."""
        for device in self.devices:
            if device.name == name:
                return device
        raise KeyError(name)


@dataclass(frozen=True)
class MapInfo:
    """A device's change map. `block_size` and `capacity` in bytes; `assumed` is what an unclean start assumed."""

    block_size: int
    block_count: int
    capacity: int
    generation: str
    change_number: int
    clean: bool
    assumed: str
    held_generation: str | None = None
    held_change_number: int | None = None


@dataclass(frozen=True)
class Extent:
    """A range of bytes of a device."""

    offset: int
    length: int


@dataclass(frozen=True)
class Tracer:
    """A tracer of dattobd. `cache_size` and `cow_size` in bytes, `fallocated` and `auto_expand_*` in MiB.

    `state` is dattobd's number, `state_name` its name; `error` 0 or a negative errno with its `reason`; `changed` the
    number of changed blocks of 4 KiB; `filled` how many percent of the COW file's room are taken.
    """

    minor: int
    bdev: str
    cow: str
    state: int
    state_name: str
    cache_size: int
    fallocated: int
    auto_expand_step: int
    auto_expand_reserved: int
    cow_size: int
    seqid: int
    uuid: str
    version: int
    changed: int
    filled: int
    error: int = 0
    reason: str = ""
    device: str | None = None
    taken: float = 0.0
    """When its snapshot was taken, in seconds since 1970."""
    finished: dict[str, str] = field(default_factory=dict)
    """Paths of the finished COW files of the series, by their numbers."""
    own: dict[str, list[int]] = field(default_factory=dict)
    """By the numbers of COW files on the device itself: what of it is theirs, offset and length in bytes by turns."""
    trusted_from: int = 0
    """What changed since snapshots with smaller numbers is not relied on."""
    live: bool = False
    """Whether it is in incremental mode over a device that is in use and not served."""
    node: str | None = None
    """Block device of its image."""
    point: str = ""
    """Of a live device's snapshot: the file with the blocks that changed before it."""


@dataclass(frozen=True)
class Status:
    """The daemon itself."""

    pid: int
    version: str
    run_dir: str
    state_dir: str
    devices: int
    snapshots: int


def as_dict(value: Any) -> dict[str, Any]:
    """A model object as plain values, without what is None (varlink leaves such fields out)."""
    return {name: entry for name, entry in asdict(value).items() if entry is not None}


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """The model object that `values` describe; fields that this version does not know are left out."""
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    given = {name: value for name, value in values.items() if name in known}
    if kind is Snapshot:
        given["storage"] = from_dict(Storage, given["storage"])
        given["devices"] = [from_dict(SnapshotDevice, entry) for entry in given.get("devices", [])]
    return kind(**given)
