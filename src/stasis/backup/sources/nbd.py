# SPDX-License-Identifier: Apache-2.0
"""Reading a point-in-time source over NBD: snapshot images are read this way, one connection per thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stasis.backup.source import Extent

if TYPE_CHECKING:
    from stasis.nbd.tls import TlsConfig

__all__ = ["ExplainedReader", "NbdReader", "nbd_zero_extents"]

# No answer for this long is a failure, in seconds: a disk that is slower than that is not coming back.
ANSWER_TIMEOUT = 120.0
ALLOCATION = "base:allocation"
# proto.md, "Metadata querying", base:allocation: NBD_STATE_ZERO tells that the extent reads as zeroes.
STATE_ZERO = 2


class NbdReader:
    """One connection to an export. Raises OSError, at opening too."""

    def __init__(self, uri: str, tls: TlsConfig | None = None) -> None:
        from stasis.nbd.client import Client  # here, so that a backup of a file does not pay for it

        self._client = Client.connect(uri, tls=tls, timeout=ANSWER_TIMEOUT)
        self.size = self._client.size
        self._longest = min(1 << 20, self._client.maximum_block)

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        """Read extents into the buffer, one right behind the other; all requests travel at once."""
        requests: list[tuple[int, memoryview]] = []
        position, longest = 0, self._longest
        for offset, length in extents:
            for start in range(0, length, longest):
                count = min(longest, length - start)
                requests.append((offset + start, buffer[position : position + count]))
                position += count
        self._client.read_many(requests)

    def abort(self) -> None:
        """Break the connection, from any thread: a read that is under way ends with an error."""
        self._client.abort()

    def close(self) -> None:
        """Say goodbye and close the connection."""
        self._client.close()


class ExplainedReader(NbdReader):
    """Tells what is lost as a whole from a place that cannot be read.

    explain: called when a read fails; raises StasisError if nothing more can be read, and why. From any thread.
    """

    def __init__(self, uri: str, explain: Callable[[], None]) -> None:
        super().__init__(uri)
        self._explain = explain
        self._aborted = False

    def read_into(self, extents: Sequence[Extent], buffer: memoryview) -> None:
        try:
            super().read_into(extents, buffer)
        except OSError:
            if not self._aborted:
                self._explain()
            raise

    def abort(self) -> None:
        self._aborted = True
        super().abort()


def nbd_zero_extents(uri: str, tls: TlsConfig | None = None) -> list[Extent]:
    """What the server says reads as zeroes: ascending and merged; empty where it cannot tell."""
    from stasis.nbd.client import Client

    with Client.connect(uri, contexts=[ALLOCATION], tls=tls, timeout=ANSWER_TIMEOUT) as client:
        if ALLOCATION not in client.contexts:
            return []
        return [(offset, length) for offset, length, state in client.extents(ALLOCATION) if state & STATE_ZERO]
