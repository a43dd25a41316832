# SPDX-License-Identifier: Apache-2.0
"""One image file: its magics, its records, and the raw bytes behind some of them (docs/formats/process-images.md).

A reader trusts no length: each is checked against the end of the file and against a limit before anything is read,
and payloads stay in the file until they are asked for, so memory is bounded by one record whatever the file says.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, Self

from stasis.process.images import codec
from stasis.process.images.damage import damaged
from stasis.process.images.kinds import Kind, kind_of_magic, schema_class
from stasis.process.images.magics import COMMON, NAMES, SERVICE
from stasis.process.images.payloads import WITH_PAYLOAD, Frames, Part, Size, frames, sizes
from stasis.process.images.wire import WireError

if TYPE_CHECKING:
    from stasis.process.images.message import Message

__all__ = ["MAX_RECORD", "MAX_RECORDS", "ImageReader", "Record"]

MAX_RECORD: Final = 64 << 20
"""Largest message, in bytes. The mappings of a task take about 50 bytes each, all in one record."""

MAX_RECORDS: Final = 1 << 22
"""In one file, so that an endless hole is no endless row of empty messages."""

_WORD = struct.Struct("<I")
_WINDOW: Final = 1 << 16  # what is read at once: most images whole


class Record(NamedTuple):
    """A message and where its payload lies. `offset` is where the record begins in the file.

    The message's class is the kind's (see kinds), which a type checker cannot know.
    """

    message: Any
    offset: int
    parts: tuple[Part, ...] = ()


class ImageReader:
    """An image file, opened for reading. Every error names the file and the offset.

    `kind` None takes the kind that the magic says. Iterating gives records; `read` gives the bytes of a part.
    """

    def __init__(self, file: BinaryIO, path: str, kind: Kind | None = None) -> None:
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._window = b""
        self._window_offset = 0
        self.kind, self.begin = self._header(kind)

    @classmethod
    def open(cls, path: str, kind: Kind | None = None) -> Self:
        """Open a file by its path; OSError where it cannot be opened."""
        file = open(path, "rb")  # noqa: SIM115  # the reader closes it
        try:
            return cls(file, path, kind)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _header(self, expected: Kind | None) -> tuple[Kind, int]:
        first = self._word(0, "its magic")
        behind = _WORD.size
        magic = first
        if first in (COMMON, SERVICE):
            magic = self._word(behind, "its second magic")
            behind *= 2
        kind = kind_of_magic(magic)
        if kind is None:
            raise damaged(self.path, behind - _WORD.size, f"{magic:#010x} begins no image that is known")
        if expected is None:
            return kind, behind
        if kind.magic != expected.magic:
            raise damaged(self.path, behind - _WORD.size,
                          f"it is an image of the kind {NAMES[magic]}, not {expected.magic_name}")
        return expected, behind

    def _word(self, offset: int, what: str) -> int:
        if self.size - offset < _WORD.size:
            raise damaged(self.path, offset, f"the file ends within {what}")
        word: int = _WORD.unpack(self._bytes(offset, _WORD.size))[0]
        return word

    def __iter__(self) -> Iterator[Record]:
        """The records from the first on."""
        offset = self.begin
        count = 0
        with_payload = self.kind.name in WITH_PAYLOAD
        while offset < self.size:
            if count == MAX_RECORDS:
                raise damaged(self.path, offset, f"more than {MAX_RECORDS} records")
            message, behind = self._message(self._class(not count), offset)
            parts: list[Part] = []
            begin, offset, count = offset, behind, count + 1
            if with_payload:
                parts, offset = self._parts(message, behind)
            yield Record(message, begin, tuple(parts))

    def _class(self, first: bool) -> type[Message]:
        if first and self.kind.magic_name == "PAGEMAP":
            return schema_class("memory.PagemapHead")
        return self.kind.message

    def _message(self, cls: type[Message], offset: int) -> tuple[Message, int]:
        """The message whose length stands at `offset`, and the offset behind it."""
        length = self._word(offset, "the length of a record")
        begin = offset + _WORD.size
        if length > self.size - begin:
            raise damaged(self.path, offset, f"a record of {length} bytes begins {self.size - begin} before the end")
        if length > MAX_RECORD:
            raise damaged(self.path, offset, f"a record of {length} bytes is larger than any")
        try:
            return codec.decode(cls, self._bytes(begin, length)), begin + length
        except WireError as error:
            raise damaged(self.path, begin + error.offset, error.reason) from error

    def _parts(self, message: Message, offset: int) -> tuple[list[Part], int]:
        """The payload that begins at `offset`, and the offset behind it."""
        framed = frames(self.kind, message)
        if framed is not None:
            return self._framed(framed, offset)
        parts = []
        for size in sizes(self.kind, message, self.size - offset):
            parts.append(self._part(offset, size, None))
            offset += size.padded
        return parts, offset

    def _framed(self, framed: Frames, offset: int) -> tuple[list[Part], int]:
        cls = schema_class(framed.message_path)
        parts: list[Part] = []
        while offset < self.size if framed.number is None else len(parts) < framed.number:
            message, offset = self._message(cls, offset)
            size = framed.size(message)
            parts.append(self._part(offset, size, message))
            offset += size.padded
        return parts, offset

    def _part(self, offset: int, size: Size, message: Message | None) -> Part:
        if size.padded > self.size - offset:
            raise damaged(self.path, offset, f"{size.padded} bytes should follow and {self.size - offset} do")
        return Part(size.name, offset, size.size, message)

    def read(self, part: Part, limit: int = MAX_RECORD) -> bytes:
        """The bytes of a part, at most `limit`; what may be larger is copied by `fileno` and `Part.offset`."""
        if part.size > limit:
            raise damaged(self.path, part.offset, f"{part.size} bytes follow, and {limit} are the limit")
        return self._bytes(part.offset, part.size)

    def fileno(self) -> int:
        return self.file.fileno()

    def _bytes(self, offset: int, size: int) -> bytes:
        begin = offset - self._window_offset
        if begin < 0 or begin + size > len(self._window):
            self._window = _read_at(self.file.fileno(), offset, max(size, _WINDOW))
            self._window_offset, begin = offset, 0
            if len(self._window) < size:
                raise damaged(self.path, offset + len(self._window), "the file ends within a record")
        return self._window[begin : begin + size]


def _read_at(fd: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes at `offset`; fewer at the end of the file only."""
    read = os.pread(fd, size, offset)
    while 0 < len(read) < size and (more := os.pread(fd, size - len(read), offset + len(read))):
        read += more
    return read
