# SPDX-License-Identifier: Apache-2.0
"""CRIU's image set: reading and writing every file of it (docs/formats/process-images.md).

`ImageSetWriter` writes a set, `ImageSet` reads one; the messages are classes in `stasis.process.images.schema`.
Modules are imported when a name of theirs is asked for: a restore needs nothing that writes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stasis.process.images.codec import FieldError, decode, encode
    from stasis.process.images.container import ImageReader, Record
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.memory import MemoryReader, PageSource
    from stasis.process.images.message import Message, has
    from stasis.process.images.pagemap import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT, Pagemap, PagemapWriter
    from stasis.process.images.payloads import Part
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.images.writer import ImageWriter

__all__ = [
    "PAGE_SIZE",
    "PE_LAZY",
    "PE_PARENT",
    "PE_PRESENT",
    "FieldError",
    "ImageReader",
    "ImageSet",
    "ImageSetWriter",
    "ImageWriter",
    "MemoryReader",
    "Message",
    "PageSource",
    "Pagemap",
    "PagemapWriter",
    "Part",
    "Record",
    "decode",
    "encode",
    "has",
]

_MODULES = {
    "FieldError": "codec",
    "ImageReader": "container",
    "ImageSet": "imageset",
    "ImageSetWriter": "setwriter",
    "ImageWriter": "writer",
    "MemoryReader": "memory",
    "Message": "message",
    "PAGE_SIZE": "pagemap",
    "PE_LAZY": "pagemap",
    "PE_PARENT": "pagemap",
    "PE_PRESENT": "pagemap",
    "PageSource": "memory",
    "Pagemap": "pagemap",
    "PagemapWriter": "pagemap",
    "Part": "payloads",
    "Record": "container",
    "decode": "codec",
    "encode": "codec",
    "has": "message",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
