# SPDX-License-Identifier: Apache-2.0
"""What is remembered of an attached device (STATE/devices/NAME/device.json), and how a device gets its name."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stasis.daemon import statefile
from stasis.errors import StateError, UsageError

__all__ = ["SERVED", "DeviceRecord", "OriginKey", "default_name", "load", "origin_key", "save", "valid_name"]

OriginKey = tuple[str, int, int]
"""What tells two origins apart: ("block", rdev, 0) or ("file", st_dev, st_ino)."""

SERVED = "stasis"
"""Driver of the devices that are served here; others are those of kernel modules."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
DAMAGED = "stasis device detach NAME --forget removes it; the next attach starts a new generation"


@dataclass
class DeviceRecord:
    """A device and the options it was attached with; sizes in bytes."""

    name: str
    path: str
    kernel: bool = False
    tracking_block: int | None = None
    buffered: bool = False
    tcp: str | None = None
    tls_certificates: str | None = None
    tls_psk: str | None = None
    bitmaps: list[int] = field(default_factory=list)
    attached: bool = True
    """False once it was detached; the map stays, and `path` tells what it is a map of."""
    driver: str = SERVED
    notes: dict[str, Any] = field(default_factory=dict)
    """What the driver of a kernel module wants back after a restart."""


def valid_name(name: str) -> str:
    """The name itself. UsageError unless it is 1 to 63 letters, digits, dots, dashes and underscores."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} cannot be the name of a device",
                         hint="use letters, digits, '.', '_' and '-', starting with a letter or digit, at most 63")
    return name


def default_name(path: str) -> str:
    """A name made from the last part of the path; what a name cannot hold becomes an underscore."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(os.path.abspath(path))).lstrip("._-")[:63]
    return name or "device"


def origin_key(path: str) -> OriginKey | None:
    """What identifies the origin at `path`, None if there is none or it cannot be looked at."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(info.st_mode):
        return "block", info.st_rdev, 0
    return "file", info.st_dev, info.st_ino


def save(directory: Path, record: DeviceRecord) -> None:
    """Remember the device, durably."""
    directory.mkdir(mode=0o700, exist_ok=True)
    statefile.write(directory / "device.json", asdict(record), durable=True)


def load(directory: Path) -> DeviceRecord:
    """The record in a device's directory. FileNotFoundError, or StateError if it is damaged."""
    path = directory / "device.json"
    value = statefile.read(path, DAMAGED)
    try:
        return _checked(value, directory.name)
    except (TypeError, ValueError) as error:
        raise StateError(f"the state file {path} is damaged: {error}", hint=DAMAGED) from error


def _checked(value: Mapping[str, Any], name: str) -> DeviceRecord:
    known = {entry.name for entry in fields(DeviceRecord)}
    if unknown := set(value) - known:
        raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
    record = DeviceRecord(**value)
    if record.name != name or not isinstance(record.path, str):
        raise ValueError(f"it is not the record of {name}")
    return record
