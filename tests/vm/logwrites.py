# SPDX-License-Identifier: Apache-2.0
"""dm-log-writes: the order in which writes reached a disk, and the disk as any power cut would have left it.

Format and meaning: the kernel's Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c.
Writes are logged when they have completed, and before the flush that covers them; so the log up to a flush, or to any
entry behind it, is a state that the disk may be found in.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from stasis.linux import files
from tests.vm.machine import Disk, run

MAGIC = 0x6A736677736872
VERSION = 1
SUPER = struct.Struct("<QQQI")  # magic, version, entries, sector size
ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, bytes of data in the entry itself

LOG_FLUSH = 1
LOG_FUA = 2
LOG_DISCARD = 4
LOG_MARK = 8


@dataclass(frozen=True)
class Entry:
    """One write, discard, flush or mark; offset and length in bytes, of both disk and log."""

    offset: int
    length: int
    flags: int
    log_offset: int
    mark: str

    @property
    def is_barrier(self) -> bool:
        return bool(self.flags & (LOG_FLUSH | LOG_FUA))


class WriteLog:
    """A log that is complete: the target that wrote it is gone."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        magic, version, count, self.sector = SUPER.unpack(os.pread(self._fd, SUPER.size, 0))
        assert (magic, version) == (MAGIC, VERSION), "not a log of dm-log-writes"
        self.entries = list(self._read(count))

    def _read(self, count: int) -> Iterator[Entry]:
        position = self.sector
        for _ in range(count):
            block = os.pread(self._fd, self.sector, position)
            sector, sectors, flags, inline = ENTRY.unpack_from(block)
            mark = block[ENTRY.size : ENTRY.size + inline].decode() if flags & LOG_MARK else ""
            data = position + self.sector
            yield Entry(sector * self.sector, sectors * self.sector, flags, data, mark)
            position = data if flags & LOG_DISCARD else data + sectors * self.sector

    def find_mark(self, name: str) -> int:
        """Index of the entry of a mark."""
        (index,) = [index for index, entry in enumerate(self.entries) if entry.mark == name]
        return index

    def replay(self, target: int, start: int, end: int) -> None:
        """Write entries start to end - 1 to an open file that is as it was before entry start."""
        for entry in self.entries[start:end]:
            if entry.flags & LOG_DISCARD:
                files.punch_hole(target, entry.offset, entry.length)
            elif entry.length:
                os.pwrite(target, os.pread(self._fd, entry.length, entry.log_offset), entry.offset)

    def close(self) -> None:
        os.close(self._fd)


def dmsetup(*arguments: str) -> None:
    """The guest has no udev: dmsetup must make the nodes itself."""
    run("env", "DM_DISABLE_UDEV=1", "dmsetup", *arguments)


@contextlib.contextmanager
def mapped(name: str, table: str) -> Iterator[str]:
    """A device-mapper device of one target line."""
    dmsetup("create", name, "--table", table)
    try:
        yield f"/dev/mapper/{name}"
    finally:
        dmsetup("remove", "--retry", name)


@contextlib.contextmanager
def logged(name: str, disk: Disk, log: Disk) -> Iterator[str]:
    """A device on disk whose writes are recorded on log."""
    with mapped(name, f"0 {disk.size // 512} log-writes {disk.path} {log.path}") as path:
        yield path


def mark(name: str, text: str) -> None:
    """Enter a mark into the log of a logged device."""
    dmsetup("message", name, "0", "mark", text)
