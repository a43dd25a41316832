# SPDX-License-Identifier: Apache-2.0
"""The framing of a backup stream: version 2 of Ceph's rbd diff (its doc/dev/rbd-diff.rst), with two records of ours.

A record is a tag, a length and that many bytes; the last one is a tag alone. Who does not know a tag skips the record,
so `rbd import-diff` reads our streams. Ours are `B`, which describes the backup, and `D`, the digest of all before it.
docs/formats/backup-stream.md has it byte by byte. A stream comes from outside: nothing in it is believed unchecked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

import zstandard
from blake3 import blake3

from stasis.errors import DamagedError

__all__ = ["LARGEST_DEVICE", "PIECE_BYTES", "Head", "Piece", "StreamReader", "StreamWriter"]

HEADER = b"rbd diff v2\n"
FROM_SNAP, TO_SNAP, SIZE, WRITE, ZERO, END = b"f", b"t", b"s", b"w", b"z", b"e"
DESCRIPTION, DIGEST = b"B", b"D"
LENGTH = struct.Struct("<Q")
EXTENT = struct.Struct("<QQ")
NAME_LENGTH = struct.Struct("<I")
KNOWN = (FROM_SNAP, TO_SNAP, SIZE, WRITE, ZERO, END, DESCRIPTION, DIGEST)
DIGEST_BYTES = 32

PIECE_BYTES = 1 << 20
LARGEST_NAME = 4096
LARGEST_DESCRIPTION = 1 << 20
LARGEST_DEVICE = 1 << 50
"""Bytes. The size in a stream decides how much a receiver prepares for."""

Piece = tuple[int, int, memoryview | None]
"""(offset, length, data) in bytes; None: zeroes. The data is valid until the next piece is asked for."""


class Sink(Protocol):
    """What a stream is written to."""

    def write(self, data: bytes | memoryview, /) -> object: ...


class Source(Protocol):
    """What a stream is read from; an empty answer is its end."""

    def readinto(self, buffer: memoryview, /) -> int: ...


@dataclass(frozen=True)
class Head:
    """What a stream says before its data. size: of the device, in bytes. description: JSON, empty if there is none."""

    to_snap: str
    size: int
    from_snap: str | None = None
    description: bytes = b""


class StreamWriter:
    """Writes a stream: the head, then extents that ascend, then `finish`."""

    def __init__(self, sink: Sink, head: Head) -> None:
        self._sink = sink
        self._digest = blake3()
        self._put(HEADER)
        if head.from_snap is not None:
            self._record(FROM_SNAP, _name(head.from_snap))
        self._record(TO_SNAP, _name(head.to_snap))
        self._record(SIZE, LENGTH.pack(head.size))
        self._record(DESCRIPTION, head.description)

    def data(self, offset: int, data: memoryview) -> None:
        """Bytes at an offset."""
        self._put(WRITE + LENGTH.pack(EXTENT.size + len(data)) + EXTENT.pack(offset, len(data)))
        self._put(data)

    def zero(self, offset: int, length: int) -> None:
        """An extent of zeroes."""
        self._record(ZERO, EXTENT.pack(offset, length))

    def finish(self) -> None:
        """End the stream."""
        self._record(DIGEST, self._digest.digest())
        self._put(END)

    def _record(self, tag: bytes, content: bytes) -> None:
        self._put(tag + LENGTH.pack(len(content)) + content)

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._sink.write(data)


def _name(text: str) -> bytes:
    encoded = text.encode()
    return NAME_LENGTH.pack(len(encoded)) + encoded


class StreamReader:
    """Reads a stream: `head` is there at once, `pieces` are the data. Raises DamagedError, which names the byte.

    The end is reached only with the right digest; what came before it is to be taken back otherwise.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._digest = blake3()
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._position = 0
        self._record_at = 0
        self._tag = b""
        if self._take(len(HEADER)) != HEADER:
            raise DamagedError("this is no backup stream: it does not begin with `rbd diff v2`",
                               hint="`stasis backup send` makes one")
        self.head = self._read_head()

    def pieces(self) -> Iterator[Piece]:
        """Extents that ascend and lie within the size, none empty, data cut to at most PIECE_BYTES."""
        end = 0
        while (tag := self._tag) in (WRITE, ZERO):
            offset, length = self._extent(tag, end)
            end = offset + length
            if tag == ZERO:
                yield offset, length, None
            else:
                yield from self._data(offset, length)
            self._tag = self._next_tag()
        self._finish(tag)

    def _read_head(self) -> Head:
        found: dict[bytes, bytes] = {}
        while (tag := self._next_tag()) not in (WRITE, ZERO, DIGEST, END):
            if tag in found and tag in KNOWN:
                self._bad(f"a second record of kind {tag.decode()}")
            found[tag] = self._content(tag)
        self._tag = tag
        if SIZE not in found or TO_SNAP not in found:
            self._bad("size or name of the backup are missing before the data")
        size = LENGTH.unpack(found[SIZE])[0]
        if size > LARGEST_DEVICE:
            self._bad(f"a device of {size} bytes is larger than any")
        origin = self._name_in(found[FROM_SNAP]) if FROM_SNAP in found else None
        return Head(self._name_in(found[TO_SNAP]), size, origin, found.get(DESCRIPTION, b""))

    def _content(self, tag: bytes) -> bytes:
        """What a record of the head holds; one that is not known is skipped."""
        length = self._length()
        if tag in (FROM_SNAP, TO_SNAP):
            return self._limited(length, NAME_LENGTH.size, NAME_LENGTH.size + LARGEST_NAME)
        if tag == SIZE:
            return self._limited(length, LENGTH.size, LENGTH.size)
        if tag == DESCRIPTION:
            return self._limited(length, 0, LARGEST_DESCRIPTION)
        self._skip(length)
        return b""

    def _limited(self, length: int, least: int, most: int) -> bytes:
        if not least <= length <= most:
            self._bad(f"a record of {length} bytes, where {least} to {most} are possible")
        return self._take(length)

    def _name_in(self, content: bytes) -> str:
        (length,), name = NAME_LENGTH.unpack_from(content), content[NAME_LENGTH.size :]
        text = name.decode(errors="replace")
        if length != len(name) or "\ufffd" in text or not text.isprintable():
            self._bad("the name of a backup is no text of the length it should have")
        return text

    def _extent(self, tag: bytes, end: int) -> tuple[int, int]:
        record = self._length()
        if record < EXTENT.size:
            self._bad(f"a record of {record} bytes has no room for an extent")
        offset, length = EXTENT.unpack(self._take(EXTENT.size))
        if record != EXTENT.size + (length if tag == WRITE else 0):
            self._bad(f"a record of {record} bytes for an extent of {length}")
        if not length:
            self._bad("an empty extent")
        if offset < end:
            self._bad(f"offset {offset}, though the data before it goes to {end}")
        if offset + length > self.head.size:
            self._bad(f"{length} bytes at {offset} are not within the device of {self.head.size} bytes")
        return offset, length

    def _data(self, offset: int, length: int) -> Iterator[Piece]:
        while length:
            piece = self._fill(min(length, PIECE_BYTES))
            yield offset, len(piece), piece
            offset, length = offset + len(piece), length - len(piece)

    def _finish(self, tag: bytes) -> None:
        while tag not in KNOWN:
            self._skip(self._length())
            tag = self._next_tag()
        if tag != DIGEST:
            self._bad("the stream has no digest at its end" if tag == END else "a record out of its place")
        expected = self._digest.digest()
        if self._length() != DIGEST_BYTES or self._take(DIGEST_BYTES) != expected:
            self._bad("the digest is not that of the stream: something in it was altered")
        if self._next_tag() != END:
            self._bad("something follows the digest")
        if self._read_into(self._buffer[:1]):
            self._bad("something follows the end")

    # ---- bytes

    def _next_tag(self) -> bytes:
        self._record_at = self._position
        tag = bytes(self._raw(1))
        if tag != DIGEST:
            self._digest.update(tag)
        return tag

    def _length(self) -> int:
        return int(LENGTH.unpack(self._take(LENGTH.size))[0])

    def _take(self, count: int) -> bytes:
        return bytes(self._fill(count))

    def _skip(self, count: int) -> None:
        while count:
            count -= len(self._fill(min(count, PIECE_BYTES)))

    def _fill(self, count: int) -> memoryview:
        view = self._raw(count)
        self._digest.update(view)
        return view

    def _raw(self, count: int) -> memoryview:
        view, done = self._buffer[:count], 0
        while done < count:
            read = self._read_into(view[done:])
            if not read:
                self._record_at = self._position
                self._bad("it ends in the middle")
            done += read
        return view

    def _read_into(self, view: memoryview) -> int:
        try:
            count = self._source.readinto(view)
        except zstandard.ZstdError as error:
            self._bad(f"it cannot be unpacked ({error})")
        self._position += count
        return count

    def _bad(self, what: str) -> NoReturn:
        raise DamagedError(f"the backup stream is damaged at byte {self._record_at}: {what}",
                           hint="nothing of it was kept; send it again")
