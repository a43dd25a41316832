# SPDX-License-Identifier: Apache-2.0
"""`stasis snapshot`: take, look at, copy and destroy snapshots."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from stasis.cli import copying, output
from stasis.cli.options import add_command, add_group, add_tls, connect, number_list, size

if TYPE_CHECKING:
    from stasis.cli.options import Groups
    from stasis.daemon.model import Event, Snapshot, SnapshotDevice

__all__ = ["add"]

UUID = "the snapshot's UUID, or the beginning of it"


def add(groups: Groups) -> None:
    """Add the group and its commands."""
    group = add_group(groups, "snapshot", "Keep devices as they are at one instant.")
    _add_create(group)
    command = _add_one(group, "add", add_device, "Add a device to a snapshot that is not taken yet.",
                       "stasis snapshot add 6f1c2a7e disk.img")
    command.add_argument("device", metavar="DEVICE", help="the device")
    _add_one(group, "take", take, "Take a snapshot, of all its devices at one instant or of none.",
             "stasis snapshot take 6f1c2a7e")
    _add_one(group, "show", show, "Show a snapshot: state, images, fill level of its storage.",
             "stasis snapshot show 6f1c2a7e --json")
    add_command(group, "list", list_, "List the snapshots.", "stasis snapshot list")
    command = _add_one(group, "watch", watch, "Print what happens to a snapshot, until it is destroyed.",
                       "stasis snapshot watch 6f1c2a7e --json")
    command.add_argument("--after", metavar="N", type=int, default=0, help="leave out the events up to this number")
    copying.add(group)
    _add_one(group, "destroy", destroy, "End a snapshot, whether or not its images are in use.",
             "stasis snapshot destroy 6f1c2a7e")
    add_command(group, "collect", collect, "Print the UUIDs of all snapshots, one per line.",
                "stasis snapshot collect")


def _add_one(group: Groups, name: str, run: object, description: str, examples: str) -> argparse.ArgumentParser:
    command = add_command(group, name, run, description, examples)  # type: ignore[arg-type]
    command.add_argument("uuid", metavar="UUID", help=UUID)
    return command


def _add_create(group: Groups) -> None:
    command = add_command(group, "create", create, "Make a snapshot of some devices; prints its UUID.", """
stasis snapshot create --storage /var/tmp --limit 4G disk.img --take
stasis snapshot create --storage memory --limit 512M data logs
""")
    command.add_argument("devices", metavar="DEVICE", nargs="*", help="the devices; more can be added before the take")
    command.add_argument("--storage", metavar="PATH", required=True,
                         help="where old contents go: a directory, file or block device, 'memory', or /dev/fd/N")
    command.add_argument("--limit", metavar="SIZE", type=size, help="the most it may take (what is free there)")
    command.add_argument("--chunk", metavar="SIZE", type=size, help="unit of copy-on-write (64K)")
    command.add_argument("--take", action="store_true", help="take it at once")
    command.add_argument("--bitmap", metavar="N,...", type=number_list, default=[],
                         help="offer dirty bitmaps since these change numbers (since the snapshot before)")
    add_tls(command, "serve the images over TCP too, on ports from this one on; port 0 lets the system choose")


def _storage(text: str) -> str | int:
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/([0-9]+)", text)
    return int(match[1]) if match else text


def create(arguments: argparse.Namespace) -> None:
    """stasis snapshot create"""
    with connect(arguments) as client:
        snapshot = client.create_snapshot(_storage(arguments.storage), arguments.devices, limit=arguments.limit,
                                          chunk=arguments.chunk, take=arguments.take, bitmaps=arguments.bitmap,
                                          tcp=arguments.tcp, tls_certificates=arguments.tls_certificates,
                                          tls_psk=arguments.tls_psk)
    if arguments.json:
        output.print_json(snapshot)
    else:
        print(snapshot.id)


def add_device(arguments: argparse.Namespace) -> None:
    """stasis snapshot add"""
    with connect(arguments) as client:
        snapshot = client.add(arguments.uuid, arguments.device)
    if arguments.json:
        output.print_json(snapshot)


def take(arguments: argparse.Namespace) -> None:
    """stasis snapshot take"""
    with connect(arguments) as client:
        snapshot = client.take(arguments.uuid)
    if arguments.json:
        output.print_json(snapshot)


def show(arguments: argparse.Namespace) -> None:
    """stasis snapshot show"""
    with connect(arguments) as client:
        snapshot = client.snapshot(arguments.uuid)
    if arguments.json:
        output.print_json(snapshot)
    else:
        _print(snapshot)


def _print(snapshot: Snapshot) -> None:
    storage = snapshot.storage
    hold = None if snapshot.hold_ns is None else f"{snapshot.hold_ns / 1e6:.1f} ms"
    full = " (at its limit)" if storage.no_space else ""
    filled = f"{output.size_text(storage.filled)} of at most {output.size_text(storage.limit)}{full}"
    output.print_fields([
        ("id", snapshot.id),
        ("state", snapshot.state),
        ("error code", snapshot.error_code or None),
        ("storage", f"{storage.path} ({storage.kind})"),
        ("filled", filled if storage.capacity else None),  # a kernel module does not tell
        ("allocated", output.size_text(storage.capacity) if storage.capacity else None),
        ("writes held for", hold),
    ])
    for device in snapshot.devices:
        print()
        _print_device(device)


def _print_device(device: SnapshotDevice) -> None:
    output.print_fields([
        ("device", device.name),
        ("image", device.uri),
        ("image over TCP", device.tcp_uri),
        ("image's node", device.node),
        ("image node", device.node),
        ("size", output.size_text(device.size) if device.size else None),
        ("error code", device.error_code or None),
        ("generation", device.generation),
        ("change number", device.change_number),
        ("chunk", output.size_text(device.chunk) if device.chunk else None),
    ])


def list_(arguments: argparse.Namespace) -> None:
    """stasis snapshot list"""
    with connect(arguments) as client:
        snapshots = client.snapshots()
    if arguments.json:
        output.print_json(snapshots)
        return
    output.print_table(["UUID", "STATE", "DEVICES", "FILLED", "LIMIT", "STORAGE"], [
        [snapshot.id, snapshot.state, ",".join(device.name for device in snapshot.devices) or None,
         output.size_text(snapshot.storage.filled), output.size_text(snapshot.storage.limit), snapshot.storage.path]
        for snapshot in snapshots
    ])


def collect(arguments: argparse.Namespace) -> None:
    """stasis snapshot collect"""
    with connect(arguments) as client:
        uuids = client.collect()
    if arguments.json:
        output.print_json(uuids)
    else:
        print("".join(f"{uuid}\n" for uuid in uuids), end="")


def watch(arguments: argparse.Namespace) -> None:
    """stasis snapshot watch"""
    with connect(arguments) as client:
        for event in client.watch(arguments.uuid, after=arguments.after):
            if arguments.json:
                output.print_json_line(event)
            else:
                print(_sentence(event), flush=True)


def _sentence(event: Event) -> str:
    """One event for people."""
    said = {
        "corrupted": f"the image of {event.device} is lost, error {-event.error_code}",
        "no_space": f"the difference storage has reached its limit of {output.size_text(event.requested)}",
        "low_space": f"the difference storage grows to {output.size_text(event.requested)}",
        "generation": f"the change map of {event.device} starts over",
    }
    reason = f" ({event.reason})" if event.reason else ""
    return f"{event.time / 1e9:.3f} {event.event}: {said.get(event.event, event.device)}{reason}"


def destroy(arguments: argparse.Namespace) -> None:
    """stasis snapshot destroy"""
    with connect(arguments) as client:
        client.destroy(arguments.uuid)
    if arguments.json:
        output.print_json({"id": arguments.uuid})
