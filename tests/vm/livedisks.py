# SPDX-License-Identifier: Apache-2.0
"""Disks of every kind that can be tracked live, made in the guest: where to write, and which devices must show it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stasis.block.frontend.node import load_module, wait_until
from tests.live.writers import loop_device, zram_device
from tests.vm.logwrites import dmsetup, mapped
from tests.vm.machine import MIB, Disk, mounted, partition, run, wait_for

__all__ = ["KINDS", "LiveDisk", "error_table", "flakey", "linear", "md_raid1", "null_blk", "reloaded", "scsi_debug",
           "small_disk"]

SECTOR = 512
SIZE = 48 * MIB
CONFIGFS = Path("/sys/kernel/config")
PARTS = [20 * MIB, 20 * MIB]


@dataclass(frozen=True)
class LiveDisk:
    """Nodes that programs write to, and nodes that are tracked: all of them, and what lies below or around."""

    written: list[str]
    tracked: list[str]


def small_disk(serial: str) -> str:
    """One of the guest's disks of 64 MiB: disk3 is virtio, disk4 NVMe."""
    if serial == "disk4":
        load_module("nvme")
        return wait_for("/dev/nvme0n1")
    return Disk.by_serial(serial).path


@contextlib.contextmanager
def partitioned(node: str) -> Iterator[LiveDisk]:
    """A disk with partitions, written through both and as a whole."""
    parts = partition(node, PARTS)
    try:
        yield LiveDisk([node, *parts], [node, *parts])
    finally:
        with open(node, "rb+", buffering=0) as device:
            device.write(bytes(MIB))
            os.fsync(device.fileno())
        run("blockdev", "--rereadpt", node)


@contextlib.contextmanager
def scsi_debug(*options: str) -> Iterator[str]:
    """A disk of the kernel's SCSI simulator."""
    before = set(os.listdir("/sys/block"))
    load_module("sd_mod")
    run("modprobe", "scsi_debug", "dev_size_mb=64", "delay=0", *options)
    assert wait_until(lambda: any(name.startswith("sd") for name in set(os.listdir("/sys/block")) - before), 60)
    (name,) = (name for name in set(os.listdir("/sys/block")) - before if name.startswith("sd"))
    try:
        yield wait_for(f"/dev/{name}")
    finally:
        run("modprobe", "-r", "scsi_debug")


@contextlib.contextmanager
def null_blk(queue_mode: int) -> Iterator[str]:
    """A disk in memory that takes requests (queue mode 2) or bios (0)."""
    run("modprobe", "null_blk", "nr_devices=0")
    if not (CONFIGFS / "nullb").exists():
        run("mount", "-t", "configfs", "configfs", CONFIGFS)
    directory = CONFIGFS / "nullb" / "nullb0"  # newer kernels name the disk after the directory, older ones number it
    directory.mkdir()
    for name, value in (("size", 64), ("memory_backed", 1), ("queue_mode", queue_mode), ("discard", 1), ("power", 1)):
        (directory / name).write_text(str(value))
    try:
        yield wait_for("/dev/nullb0")
    finally:
        (directory / "power").write_text("0")
        directory.rmdir()


def linear(size: int, *disks: Disk) -> str:
    """The table of a device that is the beginnings of some disks one behind the other, `size` bytes of each."""
    sectors = size // SECTOR
    return "\n".join(f"{number * sectors} {sectors} linear {disk.path} 0" for number, disk in enumerate(disks))


def flakey(disk: Disk, size: int, *features: str) -> str:
    """The table of a device that fails at once: all I/O, or what the features say."""
    return f"0 {size // SECTOR} flakey {disk.path} 0 0 3600 {len(features)} {' '.join(features)}"


def error_table(size: int) -> str:
    """The table of a device that fails everything."""
    return f"0 {size // SECTOR} error"


def reloaded(name: str, table: str) -> None:
    """Give a device-mapper device another table while it is in use."""
    dmsetup("load", name, "--table", table)
    dmsetup("resume", name)  # suspends by itself: what is in flight ends with the old table


@contextlib.contextmanager
def md_raid1(disks: list[Disk], size: int) -> Iterator[str]:
    """A mirror of two disks, made through sysfs as mdadm --build does it."""
    run("modprobe", "raid1")
    Path("/sys/module/md_mod/parameters/new_array").write_text("md7")
    directory = Path("/sys/block/md7/md")
    for name, value in (("metadata_version", "none"), ("level", "raid1"), ("raid_disks", "2"),
                        ("component_size", str(size // 1024))):
        (directory / name).write_text(value)
    for slot, disk in enumerate(disks):
        rdev = os.stat(disk.path).st_rdev
        (directory / "new_dev").write_text(f"{os.major(rdev)}:{os.minor(rdev)}")
        member = directory / f"dev-{os.path.basename(disk.path)}"
        (member / "slot").write_text(str(slot))
    (directory / "resync_start").write_text("none")
    (directory / "array_state").write_text("active")
    try:
        yield wait_for("/dev/md7")
    finally:
        (directory / "array_state").write_text("clear")


@contextlib.contextmanager
def _virtio(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    with partitioned(small_disk("disk3")) as disk:
        yield disk


@contextlib.contextmanager
def _nvme(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    with partitioned(small_disk("disk4")) as disk:
        yield disk


@contextlib.contextmanager
def _scsi(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    with scsi_debug("lbpu=1", "lbpws=1") as node, partitioned(node) as disk:
        yield disk


@contextlib.contextmanager
def _requests(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    with null_blk(2) as node, partitioned(node) as disk:
        yield disk


@contextlib.contextmanager
def _linear(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    below = Disk(small_disk("disk3"))
    with mapped("upper", linear(SIZE, below)) as node:
        yield LiveDisk([node], [node, below.path])


@contextlib.contextmanager
def _striped(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    """Bios are split here, and go to two disks."""
    table = f"0 {SIZE // SECTOR} striped 2 32 {disks[0].path} 0 {disks[1].path} 0"
    with mapped("striped", table) as node:
        yield LiveDisk([node], [node])


@contextlib.contextmanager
def _stacked(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    """Device-mapper over device-mapper over md over partitions."""
    parts = [Disk(path) for path in partition(disks[0].path, [SIZE, SIZE])]
    with (
        md_raid1(parts, SIZE) as mirror,
        mapped("middle", linear(SIZE, Disk(mirror))) as middle,
        mapped("upper", linear(SIZE, Disk(middle))) as upper,
    ):
        yield LiveDisk([upper], [upper, middle, mirror, *(part.path for part in parts)])


@contextlib.contextmanager
def _mirror(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    with md_raid1(disks[:2], SIZE) as node:
        yield LiveDisk([node], [node])


@contextlib.contextmanager
def _zram(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    load_module("zram")
    with zram_device(SIZE) as node:
        yield LiveDisk([node], [node])


@contextlib.contextmanager
def _brd(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    run("modprobe", "brd", "rd_nr=1", f"rd_size={SIZE // 1024}")
    try:
        yield LiveDisk([wait_for("/dev/ram0")], ["/dev/ram0"])
    finally:
        run("modprobe", "-r", "brd")


@contextlib.contextmanager
def _loop(disks: list[Disk], where: Path) -> Iterator[LiveDisk]:
    """Over a file of a file system that takes direct I/O, which the guest's root does not everywhere."""
    run("mkfs.ext4", "-q", disks[2].path)
    with mounted(disks[2].path, where / "images") as images, loop_device(images / "image", SIZE) as node:
        yield LiveDisk([node], [node])


Maker = Callable[[list[Disk], Path], contextlib.AbstractContextManager[LiveDisk]]

KINDS: dict[str, Maker] = {
    "virtio": _virtio, "nvme": _nvme, "scsi": _scsi, "null_blk": _requests, "dm-linear": _linear,
    "dm-striped": _striped, "md": _mirror, "stacked": _stacked, "zram": _zram, "brd": _brd, "loop": _loop,
}  # fmt: skip
