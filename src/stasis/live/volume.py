# SPDX-License-Identifier: Apache-2.0
"""A logical volume at one instant, by a snapshot that LVM makes of it and that lives as long as it is read.

LVM brings a file system on the volume to rest for the moment of the snapshot. What the old blocks take is free space of
the volume group, up to the size of the volume, or of the pool of a thin volume.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from typing import Any

from stasis.errors import StasisError
from stasis.linux import blockdev
from stasis.live import keeper
from stasis.live.keeper import Keeper
from stasis.live.ways import Point

__all__ = ["LogicalVolume", "undo"]

TAG = "stasis-point"
COLUMNS = "vg_name,lv_name,lv_size,vg_free,lv_layout,pool_lv,origin,lv_tags,lv_dm_path,lv_snapshot_invalid"
REMOVE_SECONDS = 30.0
"""How long whoever was killed may still have the snapshot open."""


class LogicalVolume:
    """A provider for volumes of LVM."""

    name = "LVM snapshot"

    def why_not(self, path: str) -> str:
        """Has LVM try it without doing it: a snapshot holds up all writes to the volume for a moment."""
        if not _is_volume(path):
            return "it is no volume of LVM"
        try:
            row = _look(path)
            return _refusal(row) or _said(_creation(row, "stasis_probe", "--test"))
        except StasisError as error:
            return error.message

    def take(self, path: str) -> Point:
        """A snapshot that is removed with the point. Raises OSError, StasisError."""
        if not _is_volume(path):
            raise StasisError(f"{path} is no volume of LVM")
        row = _look(path)
        if reason := _refusal(row):
            raise StasisError(f"no snapshot of {path} can be made: {reason}")
        _clear(row)
        name = f"stasis_{os.getpid()}_{secrets.token_hex(4)}"
        with_keeper = Keeper(__name__, volume=f"{row['vg_name']}/{name}")
        try:
            if said := _said(_creation(row, name)):
                raise StasisError(f"LVM cannot make a snapshot of {path}: {said}")
            fd = os.open(_row(f"{row['vg_name']}/{name}")["lv_dm_path"], os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            with_keeper.close()
            raise
        return Point(fd, with_keeper.close, lambda: _overflow(f"{row['vg_name']}/{name}"))


def _is_volume(path: str) -> bool:
    try:
        uuid = (blockdev.sysfs_path(os.stat(path).st_rdev) / "dm" / "uuid").read_text()
    except OSError:
        return False
    return uuid.startswith("LVM-")


def _refusal(row: dict[str, str]) -> str:
    if row["origin"] and not row["pool_lv"]:
        return "it is a snapshot itself"
    if not row["pool_lv"] and int(row["vg_free"]) == 0:
        return f"its volume group {row['vg_name']} has no free space"
    return ""


def _creation(row: dict[str, str], name: str, *more: str) -> list[str]:
    """The command that makes a snapshot; one as large as its origin never runs full.

    Not monitored: LVM would start its monitor as a child of ours.
    """
    command = ["lvcreate", "--yes", "--snapshot", "--permission", "r", "--monitor", "n", "--name", name,
               "--addtag", TAG, "--addtag", f"{TAG}-{keeper.owner()}", *more]
    if row["pool_lv"]:
        command += ["--setactivationskip", "n"]
    elif int(row["vg_free"]) > int(row["lv_size"]) * 102 // 100:
        command += ["--extents", "100%ORIGIN"]
    else:
        command += ["--extents", "100%FREE"]
    return [*command, f"{row['vg_name']}/{row['lv_name']}"]


# -- talking to LVM ---------------------------------------------------------------------------------------------------


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Raises StasisError if LVM is not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    program = shutil.which(command[0], path=path)
    if program is None:
        raise StasisError(f"{command[0]} is not installed", hint="the package lvm2 has it")
    return subprocess.run([program, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          errors="replace", check=False,
                          env={**os.environ, "PATH": path, "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"})


def _said(command: list[str]) -> str:
    """Why a command failed, as the first line of what it said; empty if it did not."""
    done = _run(command)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
    return lines[0].rstrip(".") if lines else f"{command[0]} ended with exit code {done.returncode}"


def _rows(*arguments: str) -> list[dict[str, str]]:
    """What `lvs` shows; sizes in bytes. Raises StasisError."""
    command = ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "--options", COLUMNS, *arguments]
    done = _run(command)
    try:
        report: Any = json.loads(done.stdout)
        rows: list[dict[str, str]] = report["report"][0]["lv"]
    except (ValueError, LookupError, TypeError):
        said = done.stderr.strip().splitlines()
        raise StasisError(f"lvs does not tell of {arguments[-1]}: {said[0].strip() if said else 'no answer'}") from None
    return rows


def _row(name: str) -> dict[str, str]:
    rows = _rows(name)
    if not rows:
        raise StasisError(f"lvs knows nothing of {name}")
    return rows[0]


def _look(path: str) -> dict[str, str]:
    """The row of the volume behind a device node."""
    mapped = (blockdev.sysfs_path(os.stat(path).st_rdev) / "dm" / "name").read_text().strip()
    return _row(f"/dev/mapper/{mapped}")


def _clear(row: dict[str, str]) -> None:
    """Remove snapshots whose makers were killed together with their keepers."""
    for other in _rows("--select", f"lv_tags={TAG}", row["vg_name"]):
        if other["origin"] == row["lv_name"] and keeper.is_abandoned(other["lv_tags"]):
            _said(["lvremove", "--yes", f"{other['vg_name']}/{other['lv_name']}"])


def _overflow(volume: str) -> str:
    """Why reads of a snapshot fail that are no fault of its origin."""
    try:
        invalid = _row(volume)["lv_snapshot_invalid"]
    except StasisError as error:
        return f"the LVM snapshot {volume} is gone: {error.message}"
    return f"the LVM snapshot {volume} ran full while it was read" if invalid not in ("", "0", "unknown") else ""


def undo(volume: str) -> str:
    """Remove a snapshot if it is there; why that cannot be."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            if not any(f"{row['vg_name']}/{row['lv_name']}" == volume for row in _rows(volume.partition("/")[0])):
                return ""
            said = _said(["lvremove", "--yes", volume])
        except StasisError as error:
            said = error.message
        if not said or time.monotonic() > deadline:
            return said
        time.sleep(0.2)  # LVM tells nobody when the last user of a volume has gone
