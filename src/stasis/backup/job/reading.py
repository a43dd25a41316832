# SPDX-License-Identifier: Apache-2.0
"""Reading chunks from a source that may have places which cannot be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from stasis.backup.source import Extent, SourceReader
from stasis.errors import StasisError

__all__ = ["ReadErrors", "read_chunks"]

# A place that cannot be read is narrowed down to this many bytes: the sector of today's disks.
FINEST = 4096


@dataclass(frozen=True)
class ReadErrors:
    """What to do about places that cannot be read: fail, or store zeroes there and note where. For messages: where."""

    path: str
    skip: bool = False


def read_chunks(reader: SourceReader, extents: Sequence[Extent], buffer: memoryview, chunk_size: int,
                errors: ReadErrors) -> list[Extent]:
    """Read extents one behind the other; returns what could not be read and is zeroes in the buffer.

    Raises StasisError where the policy is to fail, and in any case when the source as a whole is gone.
    """
    try:
        reader.read_into(extents, buffer)
        return []
    except (ConnectionError, TimeoutError) as error:
        raise _failure(errors.path, extents, error) from error
    except OSError as error:
        if not errors.skip:
            raise _failure(errors.path, extents, error) from error
    unreadable: list[Extent] = []
    position = 0
    for offset, length in extents:
        for start in range(0, length, chunk_size):
            count = min(chunk_size, length - start)
            at = position + start
            unreadable += _narrow(reader, (offset + start, count), buffer[at : at + count], errors.path)
        position += length
    return unreadable


def _narrow(reader: SourceReader, extent: Extent, view: memoryview, path: str) -> list[Extent]:
    """Read what can be read of an extent by halves; the rest becomes zeroes."""
    offset, length = extent
    try:
        reader.read_into([extent], view)
        return []
    except (ConnectionError, TimeoutError) as error:
        raise _failure(path, [extent], error) from error
    except OSError:
        if length <= FINEST:
            view[:] = bytes(length)
            return [extent]
    half = max(FINEST, length // 2 // FINEST * FINEST)
    return (_narrow(reader, (offset, half), view[:half], path)
            + _narrow(reader, (offset + half, length - half), view[half:], path))


def _failure(path: str, extents: Sequence[Extent], error: OSError) -> StasisError:
    start, end = extents[0][0], sum(extents[-1])
    said = os.strerror(error.errno) if error.errno else str(error)
    return StasisError(f"{path} cannot be read between {start} and {end}: {said}", errno=error.errno or 0,
                       hint="--on-read-error skip stores zeroes for what cannot be read")
