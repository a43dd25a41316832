# SPDX-License-Identifier: Apache-2.0
"""A mounted file system with COW files on its own device, without a worker.

A loop device stands for the kernel node and its backing file for the origin, so both sides see the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stasis.block.exports import OriginExport
from stasis.block.origin import Origin
from stasis.datto.claim import Claim
from stasis.datto.layout import Geometry
from stasis.datto.mapped import MappedCowFile
from stasis.datto.ondevice import Places, new_header
from stasis.errors import StasisError
from stasis.linux import loop
from tests.system.helpers import MIB, tool
from tests.unmounting import unmount

SIZES = {"ext4": 64, "ext3": 64, "xfs": 300, "btrfs": 120}
CHECK = {"ext4": ["e2fsck", "-fn"], "ext3": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check"]}
HELPER = "stasis.daemon.cowhelper"
COW_SIZE = 3 * MIB + 512
UUID = b"0123456789abcdef"


@dataclass
class Disk:
    """A mounted file system; `image` is what lies below it."""

    node: str
    image: Path
    mount: Path
    directory: Path
    places: Places
    claims: list[Claim | None]

    def make(self, name: str = ".cow", size: int = COW_SIZE, in_use: int = 0, seqid: int = 1) -> MappedCowFile:
        geometry = Geometry(self.image.stat().st_size)
        cow = self.places.make(str(self.mount / name), new_header(UUID, seqid, size, geometry), geometry, MIB,
                               self.node, in_use)
        assert cow is not None
        return cow

    def refuses(self, errno: int, name: str = ".cow", size: int = COW_SIZE, **fields: Any) -> str:
        """Nothing is left behind of what is refused."""
        before = sorted(self.mount.iterdir())
        with pytest.raises(StasisError) as caught:
            self.make(name, size, **fields)
        assert caught.value.errno == errno, caught.value.message
        assert sorted(self.mount.iterdir()) == before
        assert not list(self.directory.glob("pinned-*"))
        return caught.value.message


@contextmanager
def mounted_disk(directory: Path, kind: str, make: tuple[str, ...] = (), options: tuple[str, ...] = ()
                 ) -> Iterator[Disk]:
    image, mount = directory / "image", directory / "mnt"
    with image.open("wb") as file:
        file.truncate(SIZES[kind] * MIB)
    node = loop.attach(str(image), 512, SIZES[kind] * MIB, read_only=False, direct=True)
    origin = Origin(str(image), os.open(image, os.O_RDWR | os.O_CLOEXEC))
    try:
        tool(f"mkfs.{kind}", "-q", *make, node)
        mount.mkdir()
        tool("mount", *options, node, mount)
        try:
            claims: list[Claim | None] = []
            host: Any = SimpleNamespace(
                origin=origin, tracker=None, background=_Background(), export=OriginExport("disk", origin, None))
            places = Places(host, HELPER, claims.append)
            places.directory = directory
            yield Disk(node, image, mount, directory, places, claims)
        finally:
            unmount(mount)
        tool(*CHECK[kind], node)
    finally:
        origin.close()
        loop.detach(node)


class _Background:
    def run(self, job: Any, done: Any) -> None:
        try:
            job()
        except OSError as error:
            done(error)
        else:
            done(None)
