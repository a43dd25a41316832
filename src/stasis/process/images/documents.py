# SPDX-License-Identifier: Apache-2.0
"""JSON documents as text: what `stasis process decode` prints and `encode` reads."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from stasis.errors import UsageError
from stasis.process.images.codec import FieldError
from stasis.process.images.container import ImageReader
from stasis.process.images.jsonform import FormError
from stasis.process.images.jsonimage import entries, kind_of_document, write_document
from stasis.process.images.writer import ImageWriter

__all__ = ["document_text", "encode_document", "write_beside"]

_INDENT = 4  # as crit's


def document_text(image: ImageReader, *, pretty: bool = False) -> Iterator[str]:
    """The document in pieces, one entry at a time; indented if `pretty`, else on one line, as crit has it."""
    if pretty:
        head, between, tail = f'{{\n    "magic": "{image.kind.magic_name}",\n    "entries": [', ",", "\n    ]\n}\n"
    else:
        head, between, tail = f'{{"magic": "{image.kind.magic_name}", "entries": [', ", ", "]}\n"
    yield head
    first = True
    for entry in entries(image, pretty=pretty):
        yield ("" if first else between) + _entry_text(entry, pretty)
        first = False
    yield tail


def _entry_text(entry: dict[str, Any], pretty: bool) -> str:
    if not pretty:
        return json.dumps(entry)
    margin = "\n" + " " * 2 * _INDENT
    return margin + json.dumps(entry, indent=_INDENT).replace("\n", margin)


class _Unclosed(io.BytesIO):
    """What an ImageWriter writes into memory stays readable when the writer closes it."""

    def close(self) -> None:
        self.flush()


def encode_document(text: bytes, name: str) -> bytes:
    """The image that a document describes. UsageError names document and place."""
    hint = "write what `stasis process decode` prints"
    buffer = _Unclosed()
    try:
        document = json.loads(text)
        with ImageWriter(kind_of_document(document), lambda: buffer) as image:
            write_document(document, image)
    except (FormError, FieldError, UnicodeEncodeError) as error:
        raise UsageError(f"{name}: {error}", hint=hint) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON: {error}", hint=hint) from error
    return buffer.getvalue()


def write_beside(path: str, pieces: Iterator[bytes]) -> None:
    """Write a file, mode 0600, whole or not at all: beside its place, then renamed."""
    fd, beside = tempfile.mkstemp(prefix=".stasis-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        with os.fdopen(fd, "wb") as file:
            file.writelines(pieces)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
