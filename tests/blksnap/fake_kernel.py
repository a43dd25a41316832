# SPDX-License-Identifier: Apache-2.0
"""A kernel to drive: disks that are files, and a module behind the ioctl layer that behaves as the real ones do.

What is written through `FakeKernel.write` passes the module's filter, as every write does in a kernel. An image is a
copy of the disk made at the take; copy-on-write itself is the kernel's affair, but its storage is counted and fills up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from stasis.blksnap.kernel import Kernel

Number = tuple[int, int]


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Module(Protocol):
    """What a fake module answers. Unknown requests are ENOTTY, by raising `fail(errno.ENOTTY)`."""

    def control(self, request: int, argument: ctypes.Structure) -> int: ...

    def device(self, disk: Disk, request: int, argument: ctypes.Structure) -> int: ...

    def before_write(self, disk: Disk, offset: int, length: int) -> None: ...


class Disk:
    """A block device of the fake kernel: a file under its /dev."""

    def __init__(self, path: Path, number: Number) -> None:
        self.path, self.number = path, number
        self.integrity = False
        self.discarded: int | None = 0
        self.mounted_on: Path | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size


class FakeKernel(Kernel):
    """Stands in for the ioctl layer."""

    def __init__(self, directory: Path) -> None:
        self.dev = directory / "dev"
        self.dev.mkdir()
        self.disks: dict[str, Disk] = {}
        self.nodes: dict[Number, str] = {}
        self.controls: dict[str, Module] = {}
        self.modules: list[Module] = []
        self.refused: dict[str, int] = {}
        """Calls by name that fail with an errno, whatever the module would say."""
        self._open: dict[int, str] = {}
        self._next = 1000

    def load(self, module: Module, node: str) -> None:
        (self.dev / node).touch()
        self.controls[str(self.dev / node)] = module
        self.modules.append(module)

    def unload(self) -> None:
        for path in self.controls:
            Path(path).unlink()
        self.controls.clear()
        self.modules.clear()

    def add_disk(self, name: str, size: int, number: Number) -> Disk:
        path = self.dev / name
        path.write_bytes(os.urandom(size))
        disk = Disk(path, number)
        self.disks[str(path)] = disk
        self.nodes[number] = str(path)
        return disk

    def write(self, disk: Disk, offset: int, data: bytes) -> None:
        for module in self.modules:
            module.before_write(disk, offset, len(data))
        with disk.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    # -- Kernel -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[int]:
        if path not in self.controls and path not in self.disks:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        fd, self._next = self._next, self._next + 1
        self._open[fd] = path
        yield fd
        del self._open[fd]

    def ioctl(self, fd: int, name: str, request: int, argument: ctypes.Structure) -> int:
        if name in self.refused:
            raise fail(self.refused[name])
        path = self._open[fd]
        if path in self.controls:
            return self.controls[path].control(request, argument)
        for module in self.modules:
            with contextlib.suppress(_Unknown):
                return module.device(self.disks[path], request, argument)
        raise fail(errno.ENOTTY)

    def number(self, path: str) -> Number | None:
        return self.disks[path].number if path in self.disks else None

    def size(self, path: str) -> int:
        return self.disks[path].size

    def node(self, major: int, minor: int) -> str:
        if (major, minor) not in self.nodes:
            return f"/dev/block/{major}:{minor}"  # the disk that this test's own files lie on
        return self.nodes[major, minor]

    def discarded(self, path: str) -> int | None:
        return self.disks[path].discarded

    def mount_point(self, path: str) -> str | None:
        mounted = self.disks[path].mounted_on
        return None if mounted is None else str(mounted)


class _Unknown(Exception):
    """The module does not know this request on a block device."""


def unknown() -> _Unknown:
    return _Unknown()
