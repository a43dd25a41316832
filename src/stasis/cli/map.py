# SPDX-License-Identifier: Apache-2.0
"""`stasis map`: what changed since which snapshot."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.options import add_command, add_group, byte_range, connect
from stasis.errors import NotFoundError, PermissionDeniedError, StasisError, UsageError

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]

HELD = "the map held with the snapshot, which ends at its instant (the active one, which goes on until now)"


def add(groups: Groups) -> None:
    """Add the group and its commands."""
    group = add_group(groups, "map", "See what changed on a device since an earlier snapshot.")
    command = add_command(group, "info", info, "Show the figures of a device's change map.",
                          "stasis map info disk.img")
    command.add_argument("device", metavar="DEVICE", help="the device")
    command = add_command(group, "read", read, "Write a change map to a file, one byte per tracking block.",
                          "stasis map read disk.img --held --output disk.map")
    command.add_argument("device", metavar="DEVICE", help="the device")
    command.add_argument("--output", metavar="FILE", required=True, help="the file to write")
    command.add_argument("--held", action="store_true", help=HELD)
    command = add_command(group, "changed", changed, "List the byte ranges that changed since a change number.", """
stasis map changed disk.img --since 3
stasis map changed disk.img --since 3 --held --json
""")
    command.add_argument("device", metavar="DEVICE", help="the device")
    command.add_argument("--since", metavar="N", type=int, required=True,
                         help="change number of an earlier snapshot; 0 for the beginning of the generation")
    command.add_argument("--held", action="store_true", help=HELD)
    command.add_argument("--generation", metavar="UUID", help="the generation that the number belongs to")
    command = add_command(group, "mark", mark, "Mark byte ranges as changed by hand.",
                          "stasis map mark disk.img 0:1M 10G:64K")
    command.add_argument("device", metavar="DEVICE", help="the device")
    command.add_argument("ranges", metavar="OFFSET:LENGTH", nargs="+", type=byte_range, help="the ranges, with K, M, G")


def _tracked_in(arguments: argparse.Namespace) -> Path | None:
    """The state directory if the device is a live one, which is asked without the daemon; None for a served one."""
    from stasis.daemon import paths
    from stasis.live import maps

    state = paths.resolve(getattr(arguments, "run_dir", None), getattr(arguments, "state_dir", None)).state
    if not maps.is_tracked(arguments.device, state):
        if "/" in arguments.device:
            raise _unknown_path(arguments.device)
        return None
    if getattr(arguments, "held", False):
        raise UsageError(f"{arguments.device} is a live device: no snapshot holds its map", hint="leave out --held")
    return state


def _unknown_path(path: str) -> NotFoundError:
    """A path is that of a live device or of none: served devices are known by their names."""
    if not os.path.exists(path):
        return NotFoundError(f"there is no {path}", hint="stasis track list and stasis device list show what there is")
    if Path(path).is_block_device():
        return NotFoundError(f"{path} is not tracked, so there is no change map of it",
                             hint=f"stasis track start {path}")
    return NotFoundError(f"{path} is no block device that is tracked, so there is no change map of it",
                         hint="name a served device as stasis device list does")


def info(arguments: argparse.Namespace) -> None:
    """stasis map info"""
    state = _tracked_in(arguments)
    if state is None:
        with connect(arguments) as client:
            shown = client.map_info(arguments.device)
    else:
        from stasis.daemon.model import MapInfo
        from stasis.live import maps

        figures = maps.info(arguments.device, state).as_dict()
        del figures["broken"]  # what is wrong stands in `assumed`
        shown = MapInfo(**figures)
    if arguments.json:
        output.print_json(shown)
        return
    output.print_fields([
        ("tracking block", output.size_text(shown.block_size)),
        ("blocks", shown.block_count),
        ("capacity", output.size_text(shown.capacity)),
        ("generation", shown.generation),
        ("change number", shown.change_number),
        ("held generation", shown.held_generation),
        ("held change number", shown.held_change_number),
        ("clean", "yes" if shown.clean else "no, it is in use"),
        ("assumed", shown.assumed or None),
    ])


def read(arguments: argparse.Namespace) -> None:
    """stasis map read"""
    state = _tracked_in(arguments)
    if state is None:
        with connect(arguments) as client:
            data = client.read_map(arguments.device, held=arguments.held)
    else:
        from stasis.live import maps

        data = maps.read(arguments.device, state)
    try:
        with open(arguments.output, "wb") as file:
            file.write(data)
    except PermissionError as error:
        raise PermissionDeniedError(f"{arguments.output} cannot be written") from error
    except OSError as error:
        raise StasisError(f"{arguments.output} cannot be written: {error.strerror}", errno=error.errno or 0) from error
    if arguments.json:
        output.print_json({"output": os.path.abspath(arguments.output), "blocks": len(data)})


def changed(arguments: argparse.Namespace) -> None:
    """stasis map changed"""
    state = _tracked_in(arguments)
    if state is None:
        with connect(arguments) as client:
            found = client.changed_extents(arguments.device, arguments.since, held=arguments.held,
                                           generation=arguments.generation)
        extents = [(extent.offset, extent.length) for extent in found]
    else:
        from stasis.live import maps

        extents = maps.changed(arguments.device, state, arguments.since, arguments.generation)
    if arguments.json:
        output.print_json([{"offset": offset, "length": length} for offset, length in extents])
    else:
        output.print_table(["OFFSET", "LENGTH"], extents)


def mark(arguments: argparse.Namespace) -> None:
    """stasis map mark"""
    state = _tracked_in(arguments)
    if state is None:
        with connect(arguments) as client:
            client.mark(arguments.device, arguments.ranges)
    else:
        from stasis.live import maps

        maps.mark(arguments.device, state, arguments.ranges)
    if arguments.json:
        output.print_json({"ranges": len(arguments.ranges)})
