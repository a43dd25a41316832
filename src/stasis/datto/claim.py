# SPDX-License-Identifier: Apache-2.0
"""Blocks of the device that are about to become those of a COW file, and who writes to them until they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EBUSY, ESTALE

from stasis.block.origin import DISCARD_STEP, Request
from stasis.datto.extents import Territory
from stasis.errors import StateError

__all__ = ["Claim", "Watch"]


class Claim:
    """Blocks that are about to become a COW file's, or that a file of theirs is about to give up. While they are filled
    the file system writes them; after that nobody does but us, and whoever does has ended the claim.

    What is written to them beside the loop is written inside `held`: then no other write to them is under way.
    """

    def __init__(self, territory: Territory) -> None:
        self.territory = territory
        self.is_filling = True
        self.is_broken = False
        self._lock = threading.Lock()

    def see(self, requests: Sequence[Request]) -> Sequence[Request]:
        """What of these requests a tracer is to be told of."""
        if self.is_filling:
            return [(start, end - start, 0) for offset, length, _ in requests
                    for start, end in self.territory.outside(offset, offset + length)]
        if any(self.territory.touches(offset, offset + length) for offset, length, _ in requests):
            with self._lock:
                self.is_broken = True
        return requests

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from writing meanwhile. OSError ESTALE if somebody did."""
        with self._lock:
            if self.is_broken:
                raise OSError(ESTALE, "the blocks of the COW file were written through its file system")
            yield

    def require(self, path: str) -> None:
        """StateError (EBUSY) if somebody else wrote to the blocks."""
        if self.is_broken:
            raise StateError(f"{path} was taken away while it was made", errno=EBUSY, hint="try again")


class Watch:
    """An observer of a device without a tracer, for the sake of a claim."""

    step = DISCARD_STEP

    def __init__(self, claim: Claim) -> None:
        self._claim = claim

    def before(self, requests: Sequence[Request]) -> None:
        """See `Observer`."""
        self._claim.see(requests)
