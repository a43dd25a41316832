# SPDX-License-Identifier: Apache-2.0
"""The last word about a file system that stays mounted to the end: what was written until nothing writes any more.

The map of a root disk is a file on that very disk, so nothing can be added to it when the disk has come to rest. The
*seal* is a file made beforehand, each of whose pages bears a token. When the file system is read-only its contents are
filled in through the block device, past the file system, and only where the token is found: no other page of the disk
can be hit. Layout: docs/formats/live-device.md. Why it is enough: docs/design/live-tracking.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from stasis.errors import StasisError, StateError
from stasis.linux import fiemap, process

__all__ = ["Seal", "Unsealable", "extents", "fill", "forget", "prepare", "read"]

Extent = tuple[int, int]

PAGE = 4096
# Of each page: magic, token, number of the page, bytes of contents
HEAD = struct.Struct("<16s16sQI")
MAGIC = b"stasis live seal"
ROOM = PAGE - HEAD.size
HEADER_PAGES = 1

# A page that lies in one of these cannot be written through the device.
UNFIT = (fiemap.FIEMAP_EXTENT_UNKNOWN | fiemap.FIEMAP_EXTENT_DELALLOC | fiemap.FIEMAP_EXTENT_ENCODED
         | fiemap.FIEMAP_EXTENT_DATA_ENCRYPTED | fiemap.FIEMAP_EXTENT_NOT_ALIGNED | fiemap.FIEMAP_EXTENT_DATA_INLINE
         | fiemap.FIEMAP_EXTENT_DATA_TAIL | fiemap.FIEMAP_EXTENT_UNWRITTEN | fiemap.FIEMAP_EXTENT_SHARED)


class Unsealable(StasisError):
    """The file is not where it can be filled."""


@dataclass(frozen=True)
class Seal:
    """What was true when nothing wrote any more."""

    generation: str
    number: int
    mark: str
    """Of the file system, read-only by then."""
    boot: str
    digest: str
    """SHA-256 of the bits, in hex."""


def prepare(path: Path, length: int) -> None:
    """Make the file durable, with room for `length` bytes of bits. Raises OSError."""
    token = secrets.token_bytes(16)
    pages = HEADER_PAGES + -(-length // ROOM)
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        for number in range(pages):
            file.write(HEAD.pack(MAGIC, token, number, 0).ljust(PAGE, b"\0"))
        file.flush()
        os.fsync(fd)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def forget(path: Path) -> None:
    """It was taken up, or is not to be."""
    path.unlink(missing_ok=True)


def extents(path: Path, device: int) -> list[Extent]:
    """Where a file lies on the device `device`, of its own file system. Raises OSError; Unsealable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_dev != device:
            raise Unsealable(f"{path} does not lie on the tracked device itself")
        found = list(fiemap.extents(fd))
    finally:
        os.close(fd)
    if any(extent.flags & UNFIT for extent in found):
        raise Unsealable(f"{path} does not lie in plain blocks")
    return [(extent.physical, extent.length) for extent in found]


# -- the last step ------------------------------------------------------------------------------------


def fill(path: Path, node: str, device: int, seal: Seal, bits: bytes) -> None:
    """Write the bits and then the seal into the file through its device. The file system is read-only.

    Writes nothing unless every page of the file is found on the device. Raises OSError, Unsealable.
    """
    places = _places(path, device)
    chunks = [bits[start : start + ROOM] for start in range(0, len(bits), ROOM)]
    if len(chunks) + HEADER_PAGES > len(places):
        raise Unsealable(f"{path} was made for a smaller device")
    with _Device(node) as disk:
        token = disk.token(places)
        for number, chunk in enumerate(chunks, HEADER_PAGES):
            disk.write(places[number], HEAD.pack(MAGIC, token, number, len(chunk)) + chunk)
        header = json.dumps(asdict(seal)).encode()
        disk.write(places[0], HEAD.pack(MAGIC, token, 0, len(header)) + header)


def spoil(path: Path, node: str, device: int) -> None:
    """Take back what `fill` wrote. Raises OSError, Unsealable."""
    places = _places(path, device)
    with _Device(node) as disk:
        disk.write(places[0], HEAD.pack(MAGIC, disk.token(places), 0, 0))


def _places(path: Path, device: int) -> list[int]:
    """Where on the device each page of the file begins."""
    places: list[int] = []
    for offset, length in extents(path, device):
        if length % PAGE:
            raise Unsealable(f"{path} lies in pieces that are no whole pages")
        places += range(offset, offset + length, PAGE)
    return places


class _Device:
    """A block device, one page at a time, past its page cache."""

    def __init__(self, node: str) -> None:
        self._fd = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC)
        self._page = mmap.mmap(-1, PAGE)

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *_: object) -> None:
        self._page.close()
        os.close(self._fd)

    def read(self, offset: int) -> bytes:
        if os.preadv(self._fd, [self._page], offset) != PAGE:
            raise Unsealable("the device ends within the seal")
        return self._page[:]

    def write(self, offset: int, data: bytes) -> None:
        self._page[:] = data.ljust(PAGE, b"\0")
        if os.pwritev(self._fd, [self._page], offset) != PAGE:
            raise Unsealable("the device ends within the seal")

    def token(self, places: list[int]) -> bytes:
        """The token that all of these pages bear, each with its own number."""
        token = b""
        for number, offset in enumerate(places):
            magic, found, index, _ = HEAD.unpack_from(self.read(offset))
            token = token or found
            if (magic, found, index) != (MAGIC, token, number):
                raise Unsealable(f"the device does not have page {number} of the seal where it should be")
        return token


# -- the next boot ------------------------------------------------------------------------------------


def read(path: Path) -> tuple[Seal, bytes] | None:
    """The seal and its bits; None if there is none, it was not filled, or it is not whole."""
    try:
        pages = list(_pages(path.read_bytes()))
        seal = Seal(**json.loads(pages[0]))
    except (OSError, ValueError, TypeError, StateError, IndexError):
        return None
    bits = b"".join(pages[HEADER_PAGES:])
    if hashlib.sha256(bits).hexdigest() != seal.digest or seal.boot == process.boot_id():
        return None
    return seal, bits


def _pages(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), PAGE):
        magic, _, number, length = HEAD.unpack_from(content, start)
        if magic != MAGIC or number != start // PAGE or length > ROOM:
            raise StateError("not a seal", hint="it is made anew at the next shutdown")
        yield content[start + HEAD.size : start + HEAD.size + length]


def digest(bits: bytes) -> str:
    """As `Seal.digest` has it."""
    return hashlib.sha256(bits).hexdigest()


def written_by_boot_loader(device: int) -> list[Extent]:
    """What GRUB writes into before there is a kernel, and no superblock tells of, on a mounted file system."""
    found: list[Extent] = []
    for name in ("/boot/grub/grubenv", "/boot/grub2/grubenv"):
        with contextlib.suppress(OSError, Unsealable):
            found += extents(Path(name), device)
    return found
