# SPDX-License-Identifier: Apache-2.0
"""Tunable limits of the block engine, under the names blksnap gave them as module parameters.

Values are read when a device is attached or a snapshot taken; running ones keep theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from stasis.errors import StateError, UsageError

PART_SHIFT = 12
PART_SIZE = 1 << PART_SHIFT
"""Copy-on-write works in parts of 4 KiB: the page size, and the largest logical block of a disk."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All sizes are in bytes, all shifts are powers of two of bytes, times are in seconds."""

    tracking_block_minimum_shift: int = 16
    """Smallest tracking block."""
    tracking_block_maximum_count: int = 2097152
    """The tracking block grows until a map has no more blocks than this."""
    tracking_block_maximum_shift: int = 26
    """Largest tracking block; when it is reached the count may exceed the maximum."""
    chunk_minimum_shift: int = 16
    """Smallest copy-on-write chunk."""
    chunk_maximum_shift: int = 26
    """Largest copy-on-write chunk."""
    chunk_maximum_count_shift: int = 40
    """The chunk grows until a device has no more chunks than two to this power."""
    diff_storage_minimum: int = 16 << 20
    """Portion by which difference storage grows; growth starts when half of it is left."""
    intent_region_shift: int = 26
    """Region of the write-intent log."""
    intent_clear_seconds: int = 10
    """How often the change map is made durable and its regions leave the write-intent log."""
    nbd_maximum_connections: int = 64
    """Connections one export serves at a time."""
    tracer_maximum_count: int = 24
    """Tracers of dattobd: their minors go from 0 to one less."""
    hold_timeout_ms: int = 5000
    """A worker that is held longer than this lets go by itself and the take fails."""

    def validated(self) -> Settings:
        """Return these settings, or raise UsageError naming the first that makes no sense."""
        _check(
            12 <= self.tracking_block_minimum_shift <= self.tracking_block_maximum_shift <= 40,
            "tracking_block_minimum_shift",
            "12 to tracking_block_maximum_shift, which is at most 40",
        )
        _check(self.tracking_block_maximum_count >= 1, "tracking_block_maximum_count", "1 or more")
        _check(
            PART_SHIFT <= self.chunk_minimum_shift <= self.chunk_maximum_shift <= 26,
            "chunk_minimum_shift",
            f"{PART_SHIFT} to chunk_maximum_shift, which is at most 26",
        )
        _check(1 <= self.chunk_maximum_count_shift <= 40, "chunk_maximum_count_shift", "1 to 40")
        _check(
            self.diff_storage_minimum >= 2 << self.chunk_minimum_shift,
            "diff_storage_minimum",
            "two of the smallest chunks or more",
        )
        _check(20 <= self.intent_region_shift <= 40, "intent_region_shift", "20 to 40")
        _check(self.intent_clear_seconds >= 1, "intent_clear_seconds", "1 or more")
        _check(1 <= self.nbd_maximum_connections <= 1024, "nbd_maximum_connections", "1 to 1024")
        _check(1 <= self.tracer_maximum_count <= 255, "tracer_maximum_count", "1 to 255")
        _check(100 <= self.hold_timeout_ms <= 60000, "hold_timeout_ms", "100 to 60000")
        return self

    def with_values(self, values: Mapping[str, object]) -> Settings:
        """A copy with some values replaced. Unknown names and wrong values raise UsageError."""
        known = {field.name for field in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise UsageError(f"there is no setting '{name}'", hint="settings: " + ", ".join(sorted(known)))
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"setting '{name}' takes a whole number, not {value!r}")
        return replace(self, **values).validated()  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, int]:
        """Names and values, for JSON."""
        return asdict(self)


def _check(right: bool, name: str, allowed: str) -> None:
    if not right:
        raise UsageError(f"setting '{name}' is out of range", hint=f"allowed: {allowed}")


def load(path: Path) -> Settings:
    """Settings stored in `path`, or the defaults when there is no such file. StateError if it is damaged."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return Settings()
    except ValueError as error:
        raise StateError(f"{path} is no settings file: {error}", hint="mend or remove it") from error
    if not isinstance(values, dict):
        raise StateError(f"{path} is no settings file", hint="mend or remove it")
    return Settings().with_values(values)


def save(path: Path, settings: Settings) -> None:
    """Store what differs from the defaults, atomically."""
    default = Settings().as_dict()
    values = {name: value for name, value in settings.as_dict().items() if value != default[name]}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)


def tracking_block_shift(size: int, settings: Settings, wanted: int | None = None) -> int:
    """Shift of the tracking block for a device of `size` bytes; `wanted` (a size in bytes) overrides it.

    Starts at the minimum and doubles while there are more blocks than the maximum count, up to the
    maximum shift (blksnap's rule). UsageError if `wanted` is no power of two in range.
    """
    low, high = settings.tracking_block_minimum_shift, settings.tracking_block_maximum_shift
    if wanted is not None:
        return _wanted_shift(wanted, low, high, "tracking block")
    shift = low
    while shift < high and -(-size >> shift) > settings.tracking_block_maximum_count:
        shift += 1
    return shift


def chunk_shift(size: int, settings: Settings, minimum_io_size: int = 0, wanted: int | None = None) -> int:
    """Shift of the copy-on-write chunk for a device of `size` bytes; `wanted` (bytes) overrides it."""
    low, high = settings.chunk_minimum_shift, settings.chunk_maximum_shift
    if wanted is not None:
        return _wanted_shift(wanted, PART_SHIFT, high, "chunk")
    shift = low
    while shift < high and (
        1 << shift < minimum_io_size or -(-size >> shift) > 1 << settings.chunk_maximum_count_shift
    ):
        shift += 1
    return shift


def _wanted_shift(wanted: int, low: int, high: int, what: str) -> int:
    shift = wanted.bit_length() - 1
    if wanted <= 0 or wanted != 1 << shift or not low <= shift <= high:
        raise UsageError(
            f"a {what} of {wanted} bytes is not possible", hint=f"a power of two from {1 << low} to {1 << high}"
        )
    return shift
