# SPDX-License-Identifier: Apache-2.0
"""What every driver of a kernel module does, told apart from how its module wants it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stasis.blksnap.kernel import Kernel
from stasis.blksnap.meanings import driver_error
from stasis.errors import StasisError

__all__ = ["Driver", "DriverEvent", "Held", "Image", "Tracked"]


@dataclass
class Tracked:
    """A device that a module tracks. `size` in bytes; `notes` is what the driver wants back after a restart."""

    name: str
    path: str
    map_path: Path
    size: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Held:
    """A snapshot of a module. `limit` in bytes; `notes` as those of a device."""

    uuid: str
    storage: str
    limit: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """The image of one device of a taken snapshot: its node (None: there is none), and 0 or a negative errno."""

    node: str | None
    error_code: int = 0


@dataclass(frozen=True)
class DriverEvent:
    """What happened to a snapshot: "corrupted", "no_space" or "low_space".

    `device` is the number of the device or None, `error_code` a negative errno or 0, `requested` bytes of storage,
    `time` the monotonic clock in nanoseconds.
    """

    name: str
    time: int
    device: tuple[int, int] | None = None
    error_code: int = 0
    requested: int = 0


class Driver(ABC):
    """One module of this host. Errors are StasisError with the module's errno. Not thread-safe, `next_event` apart."""

    name: str
    """Name of the driver, as in `--driver`."""
    version: str
    """What the module is, for people."""
    storage_elsewhere = True
    """Whether storage must not lie on a device of the snapshot."""
    has_events = True
    """Whether `next_event` is worth calling."""

    def __init__(self, kernel: Kernel, control: str) -> None:
        self.kernel = kernel
        self.control = control

    def failed(self, call: str, subject: str, error: OSError) -> StasisError:
        """The error as users see it."""
        return driver_error(self.name, call, subject, error)

    # -- devices ----------------------------------------------------------------------------------

    @abstractmethod
    def attach(self, device: Tracked) -> None:
        """Have the module track a device, one that it tracks already included; fills in size and map."""

    @abstractmethod
    def detach(self, device: Tracked) -> None:
        """Have the module let go of a device; its changes are forgotten."""

    @abstractmethod
    def update_map(self, device: Tracked, *, held: bool) -> None:
        """Bring the device's map file up to date; `held`: a taken snapshot holds the map. Raises if it is lost."""

    @abstractmethod
    def mark(self, device: Tracked, ranges: Sequence[tuple[int, int]]) -> None:
        """Count (offset, length) ranges in bytes, which lie within the device, as changed."""

    # -- snapshots --------------------------------------------------------------------------------

    @abstractmethod
    def create(self, storage: str, limit: int | None, devices: Sequence[Tracked]) -> Held:
        """Make a snapshot of devices, not taken yet. Nothing is left behind if that fails."""

    @abstractmethod
    def add(self, held: Held, device: Tracked) -> None:
        """Add a device to a snapshot that is not taken yet."""

    @abstractmethod
    def take(self, held: Held, devices: Sequence[Tracked]) -> None:
        """Take it, on all devices at one instant or on none, and bring the maps up to date."""

    @abstractmethod
    def destroy(self, held: Held, devices: Sequence[Tracked]) -> None:
        """End a snapshot, taken or not; tracking goes on."""

    @abstractmethod
    def exists(self, held: Held) -> bool:
        """Whether the module still has the snapshot."""

    @abstractmethod
    def image(self, held: Held, device: Tracked) -> Image:
        """The image of a device of a taken snapshot, as it is now."""

    def next_event(self, held: Held, timeout_ms: int) -> DriverEvent | None:
        """The next event, or None after about `timeout_ms`; in a thread of its own. NotFoundError once it is gone."""
        return None
