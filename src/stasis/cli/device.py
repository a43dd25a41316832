# SPDX-License-Identifier: Apache-2.0
"""`stasis device`: serve disks and images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.options import add_command, add_group, add_tls, connect, number_list, size

if TYPE_CHECKING:
    from stasis.cli.options import Groups
    from stasis.daemon.model import Device

__all__ = ["add"]

DRIVERS = ("stasis", "blksnap", "dattobd")


def add(groups: Groups) -> None:
    """Add the group and its commands."""
    group = add_group(groups, "device", "Serve disks and images, so that they can be snapshotted.")
    _add_attach(group)
    _add_serve(group)
    command = add_command(group, "detach", detach, "Stop serving a device; its change map is kept.",
                          "stasis device detach disk.img")
    command.add_argument("name", metavar="NAME", help="the device")
    command.add_argument("--force", action="store_true",
                         help="even if it is in a snapshot; its image there becomes unreadable")
    command.add_argument("--forget", action="store_true", help="remove its change map too")
    add_command(group, "list", list_, "List the attached devices.", "stasis device list --json")
    command = add_command(group, "show", show, "Show one device and what its worker did.",
                          "stasis device show disk.img")
    command.add_argument("name", metavar="NAME", help="the device")
    command = add_command(group, "refresh", refresh,
                          "Serve a device that could not be served, and look at its size anew.",
                          "stasis device refresh disk.img")
    command.add_argument("name", metavar="NAME", help="the device")


def _add_attach(group: Groups) -> None:
    command = add_command(group, "attach", attach, "Serve a block device or image file; prints its NBD URI.", """
stasis device attach disk.img
stasis device attach /dev/sdb --name data --kernel
stasis device attach /dev/sdb1 --driver blksnap
nbdcopy disk.img "$(stasis device attach copy.img)"
""")
    command.add_argument("path", metavar="PATH", help="the block device or image file")
    command.add_argument("--name", metavar="NAME", help="what to call it (the last part of the path)")
    command.add_argument("--driver", metavar="MODULE", choices=DRIVERS, default=DRIVERS[0],
                         help="leave its I/O in the kernel and let this kernel module track it: blksnap or dattobd")
    command.add_argument("--kernel", action="store_true", help="give it a block device node under /dev too")
    command.add_argument("--tracking-block", metavar="SIZE", type=size,
                         help="unit of change tracking (chosen from the device's size)")
    command.add_argument("--buffered", action="store_true", help="go through the page cache")
    command.add_argument("--bitmap", metavar="N,...", type=number_list, default=[],
                         help="offer dirty bitmaps since these change numbers to NBD clients")
    add_tls(command, "serve it on this TCP address too")


def _add_serve(group: Groups) -> None:
    command = add_command(group, "serve", serve, "Serve one device in the foreground, without a daemon or snapshots.",
                          """
stasis device serve disk.img --socket /tmp/disk.sock
nbdinfo [ stasis device serve disk.img ]
""", json=False)
    command.add_argument("path", metavar="PATH", help="the block device or image file")
    command.add_argument("--name", metavar="NAME", help="name of the export (empty)")
    command.add_argument("--socket", metavar="PATH",
                         help="unix socket to listen on (the sockets that were passed in by LISTEN_FDS)")
    command.add_argument("--buffered", action="store_true", help="go through the page cache")


def attach(arguments: argparse.Namespace) -> None:
    """stasis device attach"""
    with connect(arguments) as client:
        device = client.attach(arguments.path, name=arguments.name, kernel=arguments.kernel,
                               tracking_block=arguments.tracking_block, buffered=arguments.buffered,
                               tcp=arguments.tcp, tls_certificates=arguments.tls_certificates,
                               tls_psk=arguments.tls_psk, bitmaps=arguments.bitmap, driver=arguments.driver)
    if arguments.json:
        output.print_json(device)
    else:
        print(device.uri)


def detach(arguments: argparse.Namespace) -> None:
    """stasis device detach"""
    with connect(arguments) as client:
        client.detach(arguments.name, force=arguments.force, forget=arguments.forget)
    if arguments.json:
        output.print_json({"name": arguments.name})


def list_(arguments: argparse.Namespace) -> None:
    """stasis device list"""
    with connect(arguments) as client:
        devices = client.devices()
    if arguments.json:
        output.print_json(devices)
        return
    output.print_table(["NAME", "SIZE", "STATE", "NODE", "PATH", "URI"], [
        [device.name, output.size_text(device.size), device.state, device.node, device.path, device.uri]
        for device in devices
    ])


def show(arguments: argparse.Namespace) -> None:
    """stasis device show"""
    with connect(arguments) as client:
        device = client.device(arguments.name)
    _print(device, arguments.json)


def refresh(arguments: argparse.Namespace) -> None:
    """stasis device refresh"""
    with connect(arguments) as client:
        device = client.refresh(arguments.name)
    _print(device, arguments.json)


def _print(device: Device, as_json: bool) -> None:
    if as_json:
        output.print_json(device)
        return
    output.print_fields([
        ("name", device.name),
        ("path", device.path),
        ("driver", device.driver),
        ("size", output.size_text(device.size)),
        ("state", device.state),
        ("error", device.error),
        ("uri", device.uri),
        ("tcp uri", device.tcp_uri),
        ("node", device.node),
        ("snapshot", device.snapshot),
        ("generation", device.generation),
        ("change number", device.change_number),
        ("tracking block", output.size_text(device.tracking_block)),
        ("worker pid", device.pid),
    ])
    for group, values in (device.worker or {}).items():
        if isinstance(values, dict):
            output.print_fields([(f"{group} {name}", value) for name, value in values.items()])


def serve(arguments: argparse.Namespace) -> None:
    """stasis device serve"""
    from stasis.daemon import foreground

    foreground.serve(arguments.path, export=arguments.name or "", socket_path=arguments.socket,
                     buffered=arguments.buffered)
