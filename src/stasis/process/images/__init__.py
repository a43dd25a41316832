# SPDX-License-Identifier: Apache-2.0
"""CRIU's image set: reading and writing every file of it (docs/formats/process-images.md).

`ImageSetWriter` writes a set, `ImageSet` reads one; the messages are classes in `stasis.process.images.schema`.
"""

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
