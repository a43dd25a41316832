# SPDX-License-Identifier: Apache-2.0
"""`stasis datto`: dattobd's tracers, set up and looked at; `dbdctl` and `update-img` do the rest."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stasis.cli import output
from stasis.cli.options import add_command, add_group, connect, size
from stasis.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from stasis.cli.options import Groups
    from stasis.daemon.client import Client
    from stasis.daemon.model import Tracer

__all__ = ["add"]

WATCH_SECONDS = 1.0
MIB = 1 << 20


def add(groups: Groups) -> None:
    """Add the group and its commands."""
    group = add_group(groups, "datto", "Tracers that keep dattobd's COW files.")
    _add_setup(group)
    add_command(group, "list", list_, "List the tracers.", "stasis datto list")
    command = add_command(group, "show", show, "Show a tracer.", "stasis datto show 0 --json")
    command.add_argument("minor", metavar="MINOR", type=int, help="the tracer's minor")
    add_command(group, "watch", watch, "Print each tracer whenever something about it changes, until interrupted.",
                "stasis datto watch --json")
    add_command(group, "info", info, "Print the status file, as /proc/datto-info has it.", "stasis datto info",
                json=False)
    _add_changes(group)


def _add_setup(group: Groups) -> None:
    command = add_command(group, "setup", setup, "Begin a series: keep old contents of devices in new COW files.", """
stasis datto setup disk.img /var/tmp/cow0
stasis datto setup --group data /var/tmp/data.cow logs /var/tmp/logs.cow
stasis datto setup --live --image /backup/sdb1.img /dev/sdb1 /backup/sdb1.cow0
""")
    command.add_argument("pairs", metavar="DEVICE COW", nargs="+", help="a device that is served, and its new COW file")
    command.add_argument("--group", action="store_true", help="several devices, all at one instant or none")
    command.add_argument("--live", action="store_true",
                         help="a device as it is in use, not served: incremental mode from the start")
    command.add_argument("--image", metavar="FILE", help="with --live: a new file for the first copy of the device")
    command.add_argument("--minor", metavar="N", type=int, help="the first one's minor (the lowest free ones)")
    command.add_argument("--allocate", metavar="SIZE", type=size, default=0,
                         help="size of a COW file, whole MiB (a tenth of the device)")
    command.add_argument("--cache", metavar="SIZE", type=size, default=0, help="memory for an index (300M)")


def _add_changes(group: Groups) -> None:
    command = add_command(group, "changes", changes, "List what a COW file says changed.", """
stasis datto changes /var/tmp/cow0 --json
stasis datto changes cow-of-another-host --size 100G
""")
    command.add_argument("cow", metavar="COW", help="a COW file that is finished or dormant")
    command.add_argument("--size", metavar="SIZE", type=size,
                         help="size of its device (that of the tracer of its series)")


def setup(arguments: argparse.Namespace) -> None:
    """stasis datto setup"""
    pairs = list(zip(arguments.pairs[::2], arguments.pairs[1::2], strict=False))
    if len(arguments.pairs) % 2:
        raise UsageError(f"{arguments.pairs[-1]} is a device without a COW file", hint="write DEVICE COW")
    if len(pairs) > 1 and not arguments.group:
        raise UsageError("more than one device is named", hint="--group sets them up at one instant")
    _check_live(arguments, len(pairs))
    if arguments.allocate % MIB:
        raise UsageError(f"{arguments.allocate} bytes are not whole MiB", hint="a size such as 512M")
    with connect(arguments) as client:
        minors = _minors(client, arguments.minor, len(pairs))
        if arguments.live:
            tracers = [client.datto_setup_live(minors[0], *pairs[0], arguments.image)]
        else:
            tracers = client.datto_setup([(minor, *pair) for minor, pair in zip(minors, pairs, strict=True)],
                                         fallocated_space=arguments.allocate // MIB, cache_size=arguments.cache)
    if arguments.json:
        output.print_json(tracers)
    else:
        print("".join(f"{tracer.minor}\n" for tracer in tracers), end="")


def _check_live(arguments: argparse.Namespace, count: int) -> None:
    if arguments.live != (arguments.image is not None):
        raise UsageError("--live and --image FILE go together", hint="the image is the copy that update-img updates")
    if arguments.live and (count > 1 or arguments.allocate or arguments.cache):
        raise UsageError("--live takes one device, and keeps no old contents", hint="leave the other options out")


def _minors(client: Client, first: int | None, count: int) -> list[int]:
    """The minors to use: from `first` on those that are free, from the lowest free one if it is not given."""
    used = {tracer.minor for tracer in client.datto_list()}
    start = client.datto_free_minor() if first is None else first
    free = (minor for minor in range(start, start + 256) if minor == first or minor not in used)
    return [minor for minor, _ in zip(free, range(count), strict=False)]


def list_(arguments: argparse.Namespace) -> None:
    """stasis datto list"""
    with connect(arguments) as client:
        tracers = client.datto_list()
    if arguments.json:
        output.print_json(tracers)
        return
    output.print_table(["MINOR", "STATE", "DEVICE", "NUMBER", "CHANGED", "FILLED", "COW FILE"], [
        [tracer.minor, _state(tracer), tracer.bdev, tracer.seqid or None, tracer.changed, f"{tracer.filled} %",
         tracer.cow] for tracer in tracers
    ])


def _state(tracer: Tracer) -> str:
    return f"failed ({tracer.error})" if tracer.error else tracer.state_name


def show(arguments: argparse.Namespace) -> None:
    """stasis datto show"""
    with connect(arguments) as client:
        tracer = client.datto_info(arguments.minor)
    if arguments.json:
        output.print_json(tracer)
        return
    step, reserved = tracer.auto_expand_step, tracer.auto_expand_reserved
    output.print_fields([
        ("minor", tracer.minor),
        ("state", tracer.state_name),
        ("error", f"{tracer.error}: {tracer.reason}" if tracer.error else None),
        ("device", tracer.bdev),
        ("COW file", tracer.cow),
        ("its size", output.size_text(tracer.cow_size) if tracer.cow_size else None),
        ("filled", f"{tracer.filled} %"),
        ("image", tracer.node),
        ("kept blocks", tracer.point or None),
        ("grows by itself", f"by {step} MiB while {reserved} MiB stay free" if step else None),
        ("series", tracer.uuid or None),
        ("number in it", tracer.seqid or None),
        ("changed blocks", tracer.changed),
        ("index cache", output.size_text(tracer.cache_size)),
    ])


def watch(arguments: argparse.Namespace) -> None:
    """stasis datto watch"""
    known: dict[int, dict[str, Any]] = {}
    with connect(arguments) as client:
        while True:
            now = {tracer.minor: tracer for tracer in client.datto_list()}
            for minor, tracer in now.items():
                if known.get(minor) != asdict(tracer):
                    _tell(tracer, arguments.json)
            for minor in known.keys() - now.keys():
                _tell_end(minor, arguments.json)
            known = {minor: asdict(tracer) for minor, tracer in now.items()}
            time.sleep(WATCH_SECONDS)


def _tell(tracer: Tracer, as_json: bool) -> None:
    if as_json:
        output.print_json_line(tracer)
    else:
        print(f"{tracer.minor}: {_state(tracer)}, snapshot {tracer.seqid}, {tracer.changed} blocks changed, "
              f"COW file {tracer.filled} % full", flush=True)


def _tell_end(minor: int, as_json: bool) -> None:
    if as_json:
        output.print_json_line({"minor": minor, "state": None})
    else:
        print(f"{minor}: destroyed", flush=True)


def info(arguments: argparse.Namespace) -> None:
    """stasis datto info"""
    with connect(arguments) as client:
        client.datto_list()  # which brings the file up to date
        print(client.directories.datto_info.read_text(), end="")


def changes(arguments: argparse.Namespace) -> None:
    """stasis datto changes"""
    from stasis.datto.cowreader import CowReader

    device_size = arguments.size or _size_of(arguments)
    with CowReader(arguments.cow, device_size) as reader:
        if not reader.header.is_clean:
            raise UsageError(f"{arguments.cow} is in use, or was not left in order", hint="what it lists is not all")
        extents = [{"offset": offset, "length": length} for offset, length in reader.extents()]
    if arguments.json:
        output.print_json(extents)
    else:
        print("".join(f"{extent['offset']} {extent['length']}\n" for extent in extents), end="")


def _size_of(arguments: argparse.Namespace) -> int:
    """The size of the device that the series of a COW file is of."""
    from stasis.datto.layout import Header

    with open(arguments.cow, "rb") as file:
        uuid = Header.unpack(file.read(64), arguments.cow).uuid.hex()
    with connect(arguments) as client:
        for tracer in client.datto_list():
            if tracer.uuid == uuid and tracer.device is not None:
                return _device_size(tracer.bdev) if tracer.live else client.device(tracer.device).size
    raise NotFoundError(f"no tracer that is served has the series of {arguments.cow}",
                        hint="--size tells how large its device is")


def _device_size(path: str) -> int:
    from stasis.linux import blockdev

    with open(path, "rb") as device:
        return blockdev.size(device.fileno())
