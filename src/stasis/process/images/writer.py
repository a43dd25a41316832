# SPDX-License-Identifier: Apache-2.0
"""Writing one image file: magics, records, and the raw bytes behind some of them."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final, Self

from stasis.process.images import codec
from stasis.process.images.kinds import Kind, schema_class
from stasis.process.images.magics import COMMON, SERVICE
from stasis.process.images.message import Message
from stasis.process.images.payloads import WITH_PAYLOAD, Size, frames, sizes

__all__ = ["Buffer", "ImageWriter", "Payload"]

Buffer = bytes | bytearray | memoryview
Payload = Buffer | tuple[Message, Buffer]

_WORD = struct.Struct("<I")
_COPY_SIZE: Final = 1 << 20

# What copy_file_range answers where it cannot do it between these two files.
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EPERM}


class ImageWriter:
    """An image file that is being written. `create` opens it at its end when the first record comes: without one
    there is no file.

    A value that a message cannot hold raises codec.FieldError, a payload of the wrong size ValueError; both are
    mistakes of the caller, and nothing of the record has been written then.

    `holds`: messages without payloads are only noted, and written by `write_held` or with what comes next; they must
    not be changed meanwhile.
    """

    def __init__(self, kind: Kind, create: Callable[[], BinaryIO], *, holds: bool = False) -> None:
        self.kind = kind
        self.holds = holds
        self._create = create
        self._file: BinaryIO | None = None
        self._held: list[Message] = []
        self._must_exist = False
        self.records = 0

    def begin(self) -> None:
        """An image that must exist even without records."""
        self._must_exist = True
        if not self.holds:
            self._opened()

    def write_held(self) -> None:
        """Write what is held."""
        if self._held or (self._must_exist and not self.records):
            with self:
                self._opened()

    def _opened(self) -> BinaryIO:
        """The file, with its magics written, and what came before."""
        if self._file is None:
            self._file = self._create()
            if self._file.tell() == 0:
                self._file.write(header(self.kind))
        if self._held:
            held, self._held = self._held, []
            self._file.write(b"".join(map(_framed, held)))
        return self._file

    def append(self, message: Message, *payload: Payload) -> None:
        """Write a record. `payload` is one buffer per part, or (message, buffer) where parts have messages."""
        self._check_class(message)
        if self.holds and self.kind.name not in WITH_PAYLOAD:
            self._held.append(message)
            self.records += 1
            return
        written: list[Buffer] = [_framed(message)]
        framed = frames(self.kind, message)
        if framed is None:
            plain = [part for part in payload if not isinstance(part, tuple)]
            rest = len(plain[0]) if plain else 0
            written += _padded(plain, sizes(self.kind, message, rest))
        else:
            cls = schema_class(framed.message_path)
            for part in payload:
                written += _framed_part(part, cls, framed.size)
        self._opened().writelines(written)
        self.records += 1

    def append_head(self, message: Message) -> None:
        """Write a message alone; the caller writes its payload with `copy`, of exactly the size it tells."""
        self._opened().write(_framed(message))
        self.records += 1

    def append_encoded(self, encoded: bytes) -> None:
        """Write a record that is a message's bytes already."""
        self._opened().write(_WORD.pack(len(encoded)) + encoded)
        self.records += 1

    def append_part(self, message: Message, content: Buffer) -> None:
        """Write one more part behind the last record: a ghost file's chunk with its bytes."""
        size = Size("", message.len, message.len)  # type: ignore[attr-defined]  # GhostChunkEntry
        self._opened().writelines([_framed(message), *_padded([content], [size])])

    def copy(self, fd: int, size: int, offset: int | None = None) -> None:
        """Append `size` bytes of a file, socket or pipe; from `offset`, or from where it stands.

        OSError(EIO) where it ends early.
        """
        file = self._opened()
        file.flush()
        while size > 0:
            done = _copy_some(fd, file, size, offset)
            if done == 0:
                raise OSError(errno.EIO, "the file ends early")
            size -= done
            offset = None if offset is None else offset + done
        file.seek(0, os.SEEK_END)

    def _check_class(self, message: Message) -> None:
        expected = self.kind.message
        if self.kind.magic_name == "PAGEMAP" and self.records == 0:
            expected = schema_class("memory.PagemapHead")
        if type(message) is not expected:
            raise TypeError(f"{self.kind.name} consists of {expected.__name__}, not {type(message).__name__}")

    def close(self) -> None:
        """Write out what is buffered and close the file; another record opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header(kind: Kind) -> bytes:
    """The magics that a file of this kind begins with."""
    if kind.name == "inventory":
        return _WORD.pack(kind.magic)
    return _WORD.pack(SERVICE if kind.service else COMMON) + _WORD.pack(kind.magic)


def _framed(message: Message) -> bytes:
    encoded = codec.encode(message)
    return _WORD.pack(len(encoded)) + encoded


def _padded(payload: Sequence[Buffer], announced: list[Size]) -> list[Buffer]:
    if [len(part) for part in payload] != [size.size for size in announced]:
        raise ValueError(f"a payload of {[len(part) for part in payload]} bytes is announced as {announced}")
    written: list[Buffer] = []
    for part, size in zip(payload, announced, strict=True):
        written += [part, bytes(size.padded - size.size)]
    return written


def _framed_part(part: Payload, cls: type[Message], size_of: Callable[[Message], Size]) -> list[Buffer]:
    if not isinstance(part, tuple) or type(part[0]) is not cls:
        raise TypeError(f"each part is a {cls.__name__} and its bytes")
    message, buffer = part
    return [_framed(message), *_padded([buffer], [size_of(message)])]


def _copy_some(source: int, target: BinaryIO, size: int, offset: int | None) -> int:
    try:
        return os.copy_file_range(source, target.fileno(), min(size, 1 << 30), offset_src=offset)
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    count = min(size, _COPY_SIZE)
    read = os.read(source, count) if offset is None else os.pread(source, count, offset)
    target.write(read)
    target.flush()
    return len(read)
