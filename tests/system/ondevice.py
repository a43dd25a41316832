# SPDX-License-Identifier: Apache-2.0
"""A served disk with a mounted file system that dattobd's users have: the COW file lies on the file system itself."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stasis.cli import dbdctl, update_img
from stasis.datto.extents import Territory
from stasis.linux import fiemap, immutable
from tests.minors import free_minor
from tests.runner import Stasis
from tests.system.helpers import MIB, tool, wait_until
from tests.unmounting import unmount

SIZES = {"ext4": 64 * MIB, "small blocks": 64 * MIB, "xfs": 300 * MIB}
MAKE = {"ext4": ["mkfs.ext4", "-q", "-b", "4096"], "small blocks": ["mkfs.ext4", "-q", "-b", "1024"],
        "xfs": ["mkfs.xfs", "-q"]}  # fmt: skip
CHECK = {"ext4": ["e2fsck", "-fn"], "small blocks": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}
IMAGE_OPTIONS = {"ext4": "loop", "small blocks": "loop", "xfs": "loop,nouuid"}
UNPLEASANT = [
    ["rm", "-f", "{}"], ["truncate", "-s", "0", "{}"], ["mv", "{bait}", "{}"], ["mv", "{}", "{}.away"],
    ["fallocate", "-p", "-o", "0", "-l", "1M", "{}"], ["fallocate", "-c", "-o", "0", "-l", "4096", "{}"],
    ["fallocate", "-z", "-l", "4096", "{}"], ["dd", "if=/dev/zero", "of={}", "bs=4096", "count=1", "conv=notrunc"],
]  # fmt: skip


@dataclass
class Volume:
    """The disk, its node, and the tools as a user calls them."""

    stasis: Stasis
    kind: str
    image: Path
    mount: Path
    random: random.Random
    minor: int
    node: str = ""
    foreign: list[tuple[int, int]] = field(default_factory=list)
    """Ranges that belonged to COW files of this round: they are no part of what the images promise."""

    # -- tools ----------------------------------------------------------------------------------------------

    def dbdctl(self, *arguments: str | Path) -> tuple[int, str]:
        """Status, and what was said."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = dbdctl.main([str(argument) for argument in arguments])
        return status, out.getvalue() + err.getvalue()

    def must(self, *arguments: str | Path) -> None:
        assert self.dbdctl(*arguments) == (0, "")

    def update(self, cow: Path, copy: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert update_img.main([f"/dev/datto{self.minor}", str(cow), str(copy)]) == 0

    @property
    def uri(self) -> str:
        name = f"datto{self.minor}"
        return f"nbd+unix:///{name}?socket={self.stasis.run_dir}/nbd/{name}.sock"

    def copy_image(self, path: Path) -> bytes:
        tool("nbdcopy", self.uri, path)
        return path.read_bytes()

    def info(self) -> dict[str, object]:
        found: dict[str, object] = self.stasis.json("datto", "show", str(self.minor))
        return found

    # -- the file system --------------------------------------------------------------------------------------

    def attach(self) -> None:
        options = ["--buffered"] if self.kind == "small blocks" else []  # which have smaller sectors
        self.node = self.stasis.json("device", "attach", self.image, "--name", "disk", "--kernel", *options)["node"]

    def detach(self) -> None:
        wait_until(lambda: self.stasis.run("device", "detach", "disk").returncode == 0, "detaching")

    def mounted(self) -> None:
        tool("mount", self.node, self.mount)

    def unmount(self) -> None:
        unmount(self.mount)

    def fill(self, count: int, longest: int = 600_000) -> None:
        """Make files, write over others, remove some; durable at the end."""
        for _ in range(count):
            path = self.mount / f"f{self.random.randrange(12)}"
            what = self.random.random()
            if what < 0.2:
                path.unlink(missing_ok=True)
            elif what < 0.5 and path.exists():
                with path.open("r+b") as file:
                    file.seek(self.random.randrange(path.stat().st_size))
                    file.write(self.random.randbytes(self.random.randint(1, 50_000)))
            else:
                path.write_bytes(self.random.randbytes(self.random.randint(1, longest)))
        tool("sync", "-f", self.mount)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.mount.glob("f*")}

    def be_unpleasant(self, cow: Path) -> None:
        """Everything that must not work on a COW file in use, and what may be tried in vain."""
        bait = self.mount / "bait"
        bait.write_bytes(b"b" * MIB)
        for words in UNPLEASANT:
            command = [word.format(cow, bait=bait) for word in words]
            assert subprocess.run(command, capture_output=True).returncode, command
        mover = ["xfs_fsr", "-v"] if self.kind == "xfs" else ["e4defrag"]
        subprocess.run([*mover, str(cow)], capture_output=True, timeout=120)
        if self.kind == "xfs":
            tool("cp", "--reflink=always", cow, self.mount / "clone")
            (self.mount / "clone").unlink()
        bait.unlink()

    def note_territory(self, cow: Path) -> None:
        fd = os.open(cow, os.O_RDONLY)
        try:
            self.foreign += [(extent.physical, extent.physical + extent.length) for extent in fiemap.extents(fd)]
        finally:
            os.close(fd)

    def same(self, left: bytes, right: bytes) -> bool:
        """Whether two images are the same but for what belonged to COW files."""
        blank = bytearray(left), bytearray(right)
        for start, end in self.foreign:
            for image in blank:
                image[start:end] = bytes(end - start)
        return blank[0] == blank[1]

    def check_copy(self, copy: Path, files: dict[str, bytes]) -> None:
        """A copy of an image recovers, is without fault, and has these files."""
        scratch, where = copy.with_suffix(".scratch"), copy.with_suffix(".mnt")
        tool("cp", "--sparse=always", copy, scratch)
        where.mkdir(exist_ok=True)
        tool("mount", "-o", IMAGE_OPTIONS[self.kind], scratch, where)
        try:
            assert {path.name: path.read_bytes() for path in where.glob("f*")} == files
        finally:
            unmount(where)
        tool(*CHECK[self.kind], scratch)
        scratch.unlink()

    def check_origin(self) -> None:
        tool(*CHECK[self.kind], self.node)


def is_immutable(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return bool(immutable.file_flags(fd) & immutable.FS_IMMUTABLE_FL)
    finally:
        os.close(fd)


def blank_in(image: bytes, cow: Path) -> bool:
    """Whether the COW file's own blocks read as zeroes in an image."""
    fd = os.open(cow, os.O_RDONLY)
    try:
        own = [(extent.physical, extent.physical + extent.length) for extent in fiemap.extents(fd)]
    finally:
        os.close(fd)
    return not any(image[start:end].strip(b"\0") for start, end in Territory(sorted(own), 4096).ranges)


@contextmanager
def volume(stasis: Stasis, directory: Path, kind: str, seed: int, size: int = 0) -> Iterator[Volume]:
    """Attached, made and mounted; given back, and checked, at the end."""
    image, mount = directory / "disk.img", directory / "mnt"
    with image.open("wb") as file:
        file.truncate(size or SIZES[kind])
    mount.mkdir()
    with free_minor() as minor:
        disk = Volume(stasis, kind, image, mount, random.Random(seed), minor)
        disk.attach()
        try:
            tool(*MAKE[kind], disk.node)
            disk.mounted()
            try:
                yield disk
            finally:
                if os.path.ismount(mount):
                    disk.unmount()
        finally:
            disk.detach()
    tool(*CHECK[kind], image)
