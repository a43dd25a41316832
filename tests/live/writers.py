# SPDX-License-Identifier: Apache-2.0
"""Programs that write to a block device in every way there is, while a copy of it is kept up to date by tracking."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from stasis.linux import blockdev, ioctl, loop, uring
from stasis.linux.iobuffer import IoBuffer
from stasis.live import pins
from stasis.live.tracker import Tracker

__all__ = ["MIB", "SECTOR", "Mirror", "Writers", "add_partition", "bpf_works", "loop_device", "read_direct",
           "state_directory", "zram_device"]

MIB = 1 << 20
SECTOR = 512
PAGE = 4096

# include/uapi/linux/blkpg.h: struct blkpg_ioctl_arg and struct blkpg_partition
BLKPG = ioctl.IO(0x12, 105)
BLKPG_ADD_PARTITION, BLKPG_DEL_PARTITION = 1, 2


def bpf_works() -> bool:
    """Whether this machine can track at all: root, loop devices, and a kernel that describes its types."""
    return os.geteuid() == 0 and os.path.exists(loop.CONTROL) and os.path.exists("/sys/kernel/btf/vmlinux")


@contextlib.contextmanager
def loop_device(image: Path, size: int) -> Iterator[str]:
    """A loop device of a new file, detached at the end if it is still there."""
    with open(image, "wb") as file:
        file.truncate(size)
    node = loop.attach(str(image), SECTOR, size, direct=True)
    try:
        yield node
    finally:
        if loop.is_attached(node, str(image)):
            loop.detach(node)


@contextlib.contextmanager
def zram_device(size: int) -> Iterator[str]:
    """A device whose driver takes bios, not requests."""
    number = Path("/sys/class/zram-control/hot_add").read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        yield f"/dev/zram{number}"
    finally:
        Path(f"/sys/block/zram{number}/reset").write_text("1")
        Path("/sys/class/zram-control/hot_remove").write_text(number)


@contextlib.contextmanager
def add_partition(node: str, number: int, start: int, size: int) -> Iterator[str]:
    """A partition of a disk, in bytes; kernels without parsers for partition tables take it too."""
    _partition(node, BLKPG_ADD_PARTITION, number, start, size)
    try:
        yield f"{node}p{number}"
    finally:
        _partition(node, BLKPG_DEL_PARTITION, number, 0, 0)


def _partition(node: str, operation: int, number: int, start: int, size: int) -> None:
    partition = bytearray(struct.pack("<qqi64s64s4x", start, size, number, b"", b""))
    # The kernel is given an address within a structure, so that ioctl(2) must see the bytes at a fixed place.
    with IoBuffer(PAGE) as buffer:
        buffer.view[: len(partition)] = partition
        argument = bytearray(struct.pack("<iiiiQ", operation, 0, len(partition), 0, buffer.address)[:24])
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            ioctl.call(fd, "BLKPG", BLKPG, argument)
        finally:
            os.close(fd)


def read_direct(node: str, offset: int, length: int) -> bytes:
    """What is on the device, not in its page cache."""
    fd = os.open(node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    buffer = mmap.mmap(-1, length)
    try:
        assert os.preadv(fd, [buffer], offset) == length
        return buffer[:]
    finally:
        buffer.close()
        os.close(fd)


def flush(fd: int) -> None:
    """Write what the page cache has. Once more where a direct write met a mapped page: the kernel reports that here
    (mm/filemap.c, dio_warn_stale_pagecache), whoever flushes."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        os.fsync(fd)


class Mirror:
    """A copy of a device that is brought up to date with what tracking says, and nothing else."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.node = tracker, tracker.identity.path
        tracker.turn()
        self.content = bytearray(read_direct(self.node, 0, tracker.identity.size))

    def copy(self, extents: list[tuple[int, int]]) -> None:
        for offset, length in extents:
            self.content[offset : offset + length] = read_direct(self.node, offset, length)

    def turn(self) -> None:
        self.copy(self.tracker.turn())

    def switch(self) -> None:
        """The epoch switch as at a freeze: settled only after the copy."""
        self.tracker.prepare_switch()
        switch = self.tracker.switch()
        self.copy(switch.extents)
        switch.settle()

    def missed(self) -> list[int]:
        """Numbers of the blocks in which the copy differs from the device."""
        size = self.tracker.block_size
        now = read_direct(self.node, 0, len(self.content))
        return [at // size for at in range(0, len(now), size) if now[at : at + size] != self.content[at : at + size]]


@contextlib.contextmanager
def state_directory(path: Path) -> Iterator[Path]:
    """A state directory of which nothing is left in the kernel, whatever happens."""
    try:
        yield path
    finally:
        with pins.locked():
            pins.remove(pins.directory_of(path))


class Writers:
    """Threads that write at random places, each in its own way, for a number of operations each."""

    def __init__(self, nodes: list[str], seed: int) -> None:
        self._nodes, self._seed, self._failed = nodes, seed, list[BaseException]()

    def run(self, operations: int, meanwhile: Callable[[], object]) -> None:
        """Write, and call `meanwhile` again and again until all have written and flushed."""
        kinds = [self._buffered, self._direct, self._mapped, self._ring, self._discard, self._zero]
        threads = [threading.Thread(target=self._safely, args=(kind, self._nodes[i % len(self._nodes)], i, operations))
                   for i, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            meanwhile()
        for thread in threads:
            thread.join()
        for node in self._nodes:
            fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            flush(fd)
            os.close(fd)
        assert not self._failed, self._failed

    def _safely(self, kind: Callable[[int, random.Random, int, int], None], node: str, index: int, count: int) -> None:
        flags = os.O_DIRECT if kind in (self._direct, self._ring) else 0
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | flags)
        try:
            kind(fd, random.Random(self._seed * 100 + index), blockdev.size(fd), count)
        except OSError as error:
            self._failed.append(error)
        finally:
            os.close(fd)

    @staticmethod
    def _place(draw: random.Random, size: int, longest: int) -> tuple[int, int]:
        length = draw.randrange(1, longest // PAGE + 1) * PAGE
        return draw.randrange(0, (size - length) // PAGE + 1) * PAGE, length

    def _buffered(self, fd: int, draw: random.Random, size: int, count: int) -> None:
        for number in range(count):
            offset, length = self._place(draw, size, 256 << 10)
            os.pwrite(fd, draw.randbytes(length), offset)
            if number % 8 == 7:
                flush(fd)

    def _direct(self, fd: int, draw: random.Random, size: int, count: int) -> None:
        with IoBuffer(64 << 10) as buffer:
            for _ in range(count):
                offset, length = self._place(draw, size, 64 << 10)
                buffer.view[:length] = draw.randbytes(length)
                os.pwritev(fd, [buffer.view[:length]], offset)

    def _mapped(self, fd: int, draw: random.Random, size: int, count: int) -> None:
        with mmap.mmap(fd, size) as memory:
            for number in range(count):
                offset, length = self._place(draw, size, 16 << 10)
                memory[offset : offset + length] = draw.randbytes(length)
                if number % 8 == 7:
                    flush(fd)

    def _ring(self, fd: int, draw: random.Random, size: int, count: int) -> None:
        if not uring.Ring.available():
            return self._direct(fd, draw, size, count)
        with IoBuffer(8 * PAGE) as buffer, uring.Ring(8) as ring:
            for _ in range(count):
                buffer.view[:] = draw.randbytes(len(buffer.view))
                places = [self._place(draw, size, PAGE)[0] for _ in range(8)]
                ring.run([(uring.OP_WRITE, fd, place, buffer.address + i * PAGE, PAGE)
                          for i, place in enumerate(places)])
        return None

    def _discard(self, fd: int, draw: random.Random, size: int, count: int) -> None:
        for _ in range(count // 4):
            with contextlib.suppress(OSError):  # not every file system below a loop device can
                blockdev.discard(fd, *self._place(draw, size, 8 * MIB))

    def _zero(self, fd: int, draw: random.Random, size: int, count: int) -> None:
        for _ in range(count // 4):
            blockdev.zero_out(fd, *self._place(draw, size, MIB))
