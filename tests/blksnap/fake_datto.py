# SPDX-License-Identifier: Apache-2.0
"""dattobd's state machine, with its COW files, which say what changed only once they are finished.

As in the real one an unknown request is EINVAL, the COW file is deleted when the device fails, and discards (which
`FakeKernel.write` knows nothing of) are not noted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import struct
import uuid
from pathlib import Path

from stasis.blksnap.uapi import dattobd
from tests.blksnap.fake_kernel import Disk, FakeKernel, fail, unknown

BLOCK, SECTION = 4096, 4096 * 8
MAXIMUM = 24


class Traced:
    """One minor. `index` is what the COW file's index will say: 1, or the slot of a block's old contents."""

    def __init__(self, disk: Disk, cow: Path, size: int) -> None:
        self.disk, self.cow, self.size = disk, cow, size
        self.state = int(dattobd.State.SNAPSHOT | dattobd.State.ACTIVE)
        self.error, self.seqid, self.uuid = 0, 1, uuid.uuid4().bytes
        self.index: dict[int, int] = {}
        self.busy = False

    @property
    def first_slot(self) -> int:
        sections = -(-(self.disk.size // BLOCK) // 4096)
        return 1 + 8 * sections

    def finish(self) -> None:
        """Write the COW file as it lies there when it is closed."""
        inc = not self.state & dattobd.State.SNAPSHOT
        slots = sum(value > 1 for value in self.index.values())
        header = struct.pack("<IIQQQ16sQQ", 4776, 1 | (2 if inc else 0), self.first_slot + slots, self.size, self.seqid,
                             self.uuid, 1, len(self.index))
        with self.cow.open("r+b") as file:
            file.write(header)
            for block, value in self.index.items():
                file.seek(BLOCK + 8 * block)
                file.write(struct.pack("<Q", value))


class FakeDatto:
    """The module."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.minors: dict[int, Traced] = {}

    def device(self, disk: Disk, request: int, argument: ctypes.Structure) -> int:
        raise unknown()

    def control(self, request: int, argument: ctypes.Structure) -> int:
        calls = {
            dattobd.IOCTL_SETUP_SNAP: self._setup, dattobd.IOCTL_DESTROY: self._destroy,
            dattobd.IOCTL_TRANSITION_INC: self._incremental, dattobd.IOCTL_TRANSITION_SNAP: self._snapshot,
            dattobd.IOCTL_DATTOBD_INFO: self._info, dattobd.IOCTL_GET_FREE: self._free,
        }
        if request not in calls:
            raise fail(errno.EINVAL)
        calls[request](argument)
        return 0

    def find(self, minor: int) -> Traced:
        if minor >= MAXIMUM:
            raise fail(errno.EINVAL)
        if minor not in self.minors:
            raise fail(errno.ENOENT)
        return self.minors[minor]

    def _free(self, argument: dattobd.Minor) -> None:
        argument.minor = next(minor for minor in range(MAXIMUM) if minor not in self.minors)

    def _new_cow(self, disk: Disk, address: int, mib: int) -> Path:
        cow = Path(os.fsdecode(ctypes.string_at(address)))
        if cow.is_dir():
            raise fail(errno.EISDIR)
        if not cow.parent.is_dir():
            raise fail(errno.ENOENT)
        with cow.open("wb") as file:
            file.truncate((mib << 20) or disk.size // 10)
        if disk.mounted_on is None or not cow.is_relative_to(disk.mounted_on):
            cow.unlink()
            raise fail(errno.EINVAL)
        return cow

    def _setup(self, argument: dattobd.SetupParams) -> None:
        if argument.minor in self.minors:
            raise fail(errno.EBUSY)
        disk = self.kernel.disks.get(os.fsdecode(ctypes.string_at(argument.bdev)))
        if disk is None:
            raise fail(errno.ENOENT)
        if disk.mounted_on is None or any(traced.disk is disk for traced in self.minors.values()):
            raise fail(errno.EINVAL)
        cow = self._new_cow(disk, argument.cow, argument.fallocated_space)
        self.minors[argument.minor] = Traced(disk, cow, cow.stat().st_size)
        self._show(argument.minor)

    def image(self, minor: int) -> Path:
        return self.kernel.dev / f"datto{minor}"

    def _show(self, minor: int) -> None:
        shutil.copyfile(self.minors[minor].disk.path, self.image(minor))
        self.image(minor).chmod(0o400)

    def _destroy(self, argument: dattobd.Minor) -> None:
        traced = self.find(argument.minor)
        if traced.busy:
            raise fail(errno.EBUSY)
        traced.cow.unlink(missing_ok=True)
        self.image(argument.minor).unlink(missing_ok=True)
        del self.minors[argument.minor]

    def _incremental(self, argument: dattobd.Minor) -> None:
        traced = self.find(argument.minor)
        if traced.busy:
            raise fail(errno.EBUSY)
        if traced.error or traced.state != 3:
            raise fail(errno.EINVAL)
        traced.state = 2
        self.image(argument.minor).unlink()

    def _snapshot(self, argument: dattobd.TransitionSnapParams) -> None:
        traced = self.find(argument.minor)
        if traced.error or traced.state != 2:
            raise fail(errno.EINVAL)
        cow = self._new_cow(traced.disk, argument.cow, argument.fallocated_space)
        traced.finish()
        traced.cow, traced.size, traced.state, traced.seqid = cow, cow.stat().st_size, 3, traced.seqid + 1
        traced.index = {}
        self._show(argument.minor)

    def _info(self, info: dattobd.Info) -> None:
        traced = self.find(info.minor)
        info.state, info.error, info.seqid = traced.state, traced.error, traced.seqid
        info.falloc_size = traced.size
        ctypes.memmove(ctypes.addressof(info) + dattobd.Info.uuid.offset, traced.uuid, 16)
        info.cow = b"/" + os.fsencode(traced.cow.relative_to(traced.disk.mounted_on or "/"))
        info.bdev = os.fsencode(traced.disk.path)

    # -- what happens -----------------------------------------------------------------------------

    def before_write(self, disk: Disk, offset: int, length: int) -> None:
        for traced in self.minors.values():
            if traced.disk is disk and not traced.error:
                for block in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
                    self._note(traced, block)

    def _note(self, traced: Traced, block: int) -> None:
        if block in traced.index or traced.error:
            return
        if not traced.state & dattobd.State.SNAPSHOT:
            traced.index[block] = 1
            return
        slot = traced.first_slot + sum(value > 1 for value in traced.index.values())
        if slot * BLOCK >= traced.size:
            self.break_down(traced, errno.EFBIG)
            return
        traced.index[block] = slot

    def break_down(self, traced: Traced, error: int) -> None:
        """The device fails: nothing more is noted, and the COW file goes."""
        traced.error = -error
        traced.cow.unlink(missing_ok=True)
