# SPDX-License-Identifier: Apache-2.0
"""`stasis track`: know what changes on disks that are mounted now."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.options import add_command, add_group, size

if TYPE_CHECKING:
    from stasis.cli.options import Groups
    from stasis.live.tracking import TrackedDevice

__all__ = ["add"]


def add(groups: Groups) -> None:
    """Add the group and its commands."""
    group = add_group(groups, "track", "Know what changes on disks that stay as they are, mounted and in use.")
    command = add_command(group, "start", start, "Track the changes of block devices from now on.", """
stasis track start /dev/vda1
stasis track start /dev/disk/by-id/nvme-SERIAL /dev/vg/data
""")
    command.add_argument("devices", metavar="DEVICE", nargs="+",
                         help="a block device; a path that stays the same over reboots is best")
    command.add_argument("--block-size", metavar="SIZE", type=size,
                         help="unit of tracking, a power of two from 64K (64K, or more on large devices)")
    add_command(group, "list", list_, "List the tracked devices.", "stasis track list --json")
    command = add_command(group, "show", show, "Show a tracked device, or what this machine is capable of.", """
stasis track show vda1
stasis track show --capabilities
""")
    command.add_argument("device", metavar="DEVICE", nargs="?", help="name or path of the device")
    command.add_argument("--capabilities", action="store_true",
                         help="show instead what tracking needs and whether it is there")
    command = add_command(group, "stop", stop, "Track devices no longer, and forget what changed.",
                          "stasis track stop vda1")
    command.add_argument("devices", metavar="DEVICE", nargs="+", help="name or path of a tracked device")
    command = add_command(group, "save", save, "Keep the maps over a reboot: the last thing at shutdown.", """
stasis track save
stasis track save --final
""")
    command.add_argument("--final", action="store_true",
                         help="that of the root disk, when everything is read-only and no program is left")
    command = add_command(group, "resume", resume, "Track again after a boot what was tracked before.", """
stasis track resume --early
stasis track resume --early --no-wait
stasis track resume
""")
    command.add_argument("--early", action="store_true",
                         help="only start, before file systems are mounted; a later resume takes the maps up")
    command.add_argument("--no-wait", action="store_true",
                         help="with --early: leave out what is not there yet, and do not wait for it")


def _state(arguments: argparse.Namespace) -> Path:
    from stasis.daemon import paths

    return paths.resolve(getattr(arguments, "run_dir", None), getattr(arguments, "state_dir", None)).state


def start(arguments: argparse.Namespace) -> None:
    """stasis track start"""
    from stasis.live import tracking

    state = _state(arguments)
    started = tracking.start_all(arguments.devices, state, block_size=arguments.block_size)
    devices = [tracking.inspect(name, state) for name in started]
    if arguments.json:
        output.print_json([device.as_dict() for device in devices])
        return
    for device in devices:
        print(f"{device.path} is tracked, in blocks of {output.size_text(device.block_size)}")


def list_(arguments: argparse.Namespace) -> None:
    """stasis track list"""
    from stasis.live import tracking

    devices = tracking.tracked(_state(arguments))
    if arguments.json:
        output.print_json([device.as_dict() for device in devices])
        return
    head = ["NAME", "PATH", "SIZE", "NUMBER", "CHANGED", "STATE"]
    output.print_table(head, [_row(device) for device in devices])


def _row(device: TrackedDevice) -> list[object]:
    changed = None if device.lost else output.size_text(device.changed_blocks * device.block_size)
    return [device.name, device.path, output.size_text(device.size), device.change_number, changed,
            f"lost: {device.lost}" if device.lost else "tracked"]


def show(arguments: argparse.Namespace) -> None:
    """stasis track show"""
    from stasis.errors import UsageError

    if arguments.capabilities:
        _show_capabilities(arguments)
    elif arguments.device is None:
        raise UsageError("no device was named", hint="stasis track list shows them")
    else:
        _show_device(arguments)


def _show_capabilities(arguments: argparse.Namespace) -> None:
    from stasis.live import capabilities

    found = capabilities.probe(arguments.device)
    if arguments.json:
        output.print_json([capability.as_dict() for capability in found])
        return
    output.print_table(["WHAT", "THERE", "DETAIL"],
                       [[one.name, "yes" if one.available else "no", one.detail] for one in found])


def _show_device(arguments: argparse.Namespace) -> None:
    from stasis.live import tracking

    device = tracking.inspect(arguments.device, _state(arguments))
    if arguments.json:
        output.print_json(device.as_dict())
        return
    output.print_fields([
        ("name", device.name),
        ("path", device.path),
        ("size", output.size_text(device.size)),
        ("tracking block", output.size_text(device.block_size)),
        ("generation", device.generation),
        ("change number", device.change_number),
        ("changed since", None if device.lost else output.size_text(device.changed_blocks * device.block_size)),
        ("lost", device.lost or None),
        ("generation began", device.note or None),
    ])


def stop(arguments: argparse.Namespace) -> None:
    """stasis track stop"""
    from stasis.live import tracking

    tracking.stop_all(arguments.devices, _state(arguments))
    if arguments.json:
        output.print_json({"stopped": arguments.devices})


def save(arguments: argparse.Namespace) -> None:
    """stasis track save"""
    from stasis.live import lasting, sealing

    state = _state(arguments)
    _tell(arguments, sealing.finish(state) if arguments.final else lasting.save(state))


def resume(arguments: argparse.Namespace) -> None:
    """stasis track resume"""
    from stasis.errors import UsageError
    from stasis.live import lasting

    state = _state(arguments)
    if arguments.early:
        _tell(arguments, lasting.resume_early(state, wait=not arguments.no_wait))
    elif arguments.no_wait:
        raise UsageError("--no-wait goes with --early", hint="a later resume does not wait")
    else:
        _tell(arguments, lasting.resume(state))


def _tell(arguments: argparse.Namespace, told: list[tuple[str, str]]) -> None:
    if arguments.json:
        output.print_json([{"device": name, "result": result} for name, result in told])
        return
    for name, result in told:
        print(f"{name}: {output.printable(result)}")
