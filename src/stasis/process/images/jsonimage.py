# SPDX-License-Identifier: Apache-2.0
"""Image files as JSON documents and back, in the form of crit: {"magic": NAME, "entries": [...]}.

The bytes behind a record are in its "extra": base64 text for most, an object or a list where there are several.
The chunks of a ghost file are entries of their own. Entries are made one at a time, so that an image of any length
can be printed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from stasis.process.images.codec import FieldError
from stasis.process.images.container import ImageReader, Record
from stasis.process.images.jsonform import FormError, bytes_from_text, bytes_text, from_json, to_json
from stasis.process.images.kinds import KINDS, Kind, schema_class
from stasis.process.images.message import Message
from stasis.process.images.payloads import sizes
from stasis.process.images.writer import ImageWriter

__all__ = ["entries", "kind_of_document", "write_document"]

EXTRA = "extra"


def entries(image: ImageReader, *, pretty: bool = False) -> Iterator[dict[str, Any]]:
    """The image's entries, one by one."""
    for record in image:
        entry = to_json(record.message, pretty=pretty)
        if image.kind.name == "ghost-file" and record.parts and record.parts[0].message is not None:
            yield entry
            for part in record.parts:
                yield {**_message(part.message, pretty), EXTRA: bytes_text(image.read(part))}
            continue
        extra = _extra(image, record, pretty)
        yield entry if extra is None else {**entry, EXTRA: extra}


def _message(message: Message | None, pretty: bool) -> dict[str, Any]:
    return {} if message is None else to_json(message, pretty=pretty)


def _extra(image: ImageReader, record: Record, pretty: bool) -> Any:
    if image.kind.name == "ipcns-msg":
        pairs = [[_message(part.message, pretty), bytes_text(image.read(part))] for part in record.parts]
        return [item for pair in pairs for item in pair]
    if image.kind.name == "ipcns-sem":
        packed = image.read(record.parts[0])
        return list(struct.unpack(f"<{len(packed) // 2}H", packed))
    if len(record.parts) > 1:
        return {part.name: bytes_text(image.read(part)) for part in record.parts}
    return bytes_text(image.read(record.parts[0])) if record.parts else None


def kind_of_document(document: object) -> Kind:
    """The kind of image that a document describes. FormError."""
    if not isinstance(document, dict) or not isinstance(document.get("entries"), list):
        raise FormError('the document is no object with "magic" and "entries"')
    name = document.get("magic")
    for kind in KINDS.values():
        if kind.magic_name == name:
            return kind
    raise FormError(f"{name!r:.40} is no magic of an image")


def write_document(document: Any, image: ImageWriter) -> None:
    """Write a document's entries. FormError names the entry; codec.FieldError for a value out of range."""
    image.begin()
    ghost = False
    for index, entry in enumerate(document["entries"]):
        where = f"entries[{index}]"
        if not isinstance(entry, dict):
            raise FormError(f"{where} is no object")
        if ghost:
            _write_chunk(image, entry, where)
            continue
        cls = image.kind.message
        if image.kind.magic_name == "PAGEMAP" and index == 0:
            cls = schema_class("memory.PagemapHead")
        message = from_json(cls, {name: value for name, value in entry.items() if name != EXTRA}, where)
        ghost = image.kind.name == "ghost-file" and bool(getattr(message, "chunks", False))
        try:
            image.append(message, *_payload(image.kind, message, entry.get(EXTRA), f"{where}.extra"))
        except (FormError, FieldError):
            raise
        except (TypeError, ValueError, struct.error) as error:
            raise FormError(f"{where}.extra does not fit: {error}") from error


def _write_chunk(image: ImageWriter, entry: dict[str, Any], where: str) -> None:
    cls = schema_class("files.GhostChunkEntry")
    chunk: Any = from_json(cls, {name: value for name, value in entry.items() if name != EXTRA}, where)
    content = bytes_from_text(entry.get(EXTRA), f"{where}.extra")
    if chunk.len != len(content):
        raise FormError(f"{where}.extra has {len(content)} bytes and its chunk {chunk.len}")
    image.append_part(chunk, content)


def _payload(kind: Kind, message: Message, extra: Any, where: str) -> list[Any]:
    if extra is None:
        return []
    if kind.name == "ipcns-msg":
        return _messages(extra, where)
    if kind.name == "ipcns-sem":
        if not isinstance(extra, list):
            raise FormError(f"{where} is no list")
        return [struct.pack(f"<{len(extra)}H", *extra)]
    if isinstance(extra, dict):  # by name, whatever the order
        return [bytes_from_text(extra.get(size.name), f"{where}.{size.name}") for size in sizes(kind, message, 0)]
    return [bytes_from_text(extra, where)]


def _messages(extra: Any, where: str) -> list[Any]:
    if not isinstance(extra, list) or len(extra) % 2:
        raise FormError(f"{where} is no list of messages and their bytes")
    cls = schema_class("ipc.IpcMsg")
    return [
        (from_json(cls, extra[index], f"{where}[{index}]"),
         bytes_from_text(extra[index + 1], f"{where}[{index + 1}]"))
        for index in range(0, len(extra), 2)
    ]
