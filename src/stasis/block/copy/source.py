# SPDX-License-Identifier: Apache-2.0
"""The image that is read by a copy: what a copy needs of an NBD client, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from stasis.block.copy.plan import Extent, merge
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.client import Client
from stasis.nbd.tls import TlsConfig

__all__ = ["ImageSource", "NbdSource", "OpenSource"]

ALLOCATION = "base:allocation"
# proto.md, "Metadata querying", base:allocation: NBD_STATE_ZERO tells that the extent reads as zeroes. HOLE alone
# says nothing about the contents.
STATE_ZERO = 2
# Longest request. Larger ones save nothing, smaller ones cost a header each.
REQUEST_SIZE = 1 << 20
# No answer for this long is a failure, in seconds: a disk that is slower than that is not coming back.
ANSWER_TIMEOUT = 120.0


class ImageSource(Protocol):
    """One connection to an image. `size` in bytes."""

    size: int

    def read(self, extents: Sequence[Extent], buffer: IoBuffer) -> None:
        """Read extents into the buffer, one right after the other, from its start on. Raises OSError."""

    def zero_extents(self) -> list[Extent]:
        """What the server says reads as zeroes; ascending and merged; empty where it cannot tell."""

    def abort(self) -> None:
        """Break the connection, from any thread: a read that is under way ends with an error."""

    def close(self) -> None:
        """Say goodbye and close the connection."""


OpenSource = Callable[[], ImageSource]


class NbdSource:
    """An image behind NBD."""

    def __init__(self, uri: str, tls: TlsConfig | None = None) -> None:
        self._client = Client.connect(uri, contexts=[ALLOCATION], tls=tls, timeout=ANSWER_TIMEOUT)
        self.size = self._client.size
        self._request_size = min(REQUEST_SIZE, self._client.maximum_block)

    def read(self, extents: Sequence[Extent], buffer: IoBuffer) -> None:
        requests: list[tuple[int, memoryview]] = []
        position = 0
        for offset, length in extents:
            for start in range(0, length, self._request_size):
                count = min(self._request_size, length - start)
                requests.append((offset + start, buffer.view[position : position + count]))
                position += count
        self._client.read_many(requests)

    def zero_extents(self) -> list[Extent]:
        if ALLOCATION not in self._client.contexts:
            return []
        found = self._client.extents(ALLOCATION)
        return merge((offset, length) for offset, length, state in found if state & STATE_ZERO)

    def abort(self) -> None:
        self._client.abort()

    def close(self) -> None:
        self._client.close()
