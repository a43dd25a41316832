# SPDX-License-Identifier: Apache-2.0
"""Blocks of the device that are about to become those of a COW file, and who writes to them until they are."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EBUSY

from stasis.block.origin import DISCARD_STEP, Request
from stasis.datto.extents import Territory
from stasis.errors import StateError

__all__ = ["Claim", "Watch"]


class Claim:
    """Blocks that are about to become a COW file's. While they are filled the file system writes them; after that
    nobody does but us, and whoever does has ended the claim."""

    def __init__(self, territory: Territory) -> None:
        self.territory = territory
        self.is_filling = True
        self.is_broken = False

    def see(self, requests: Sequence[Request]) -> Sequence[Request]:
        """What of these requests a tracer is to be told of."""
        if self.is_filling:
            return [(start, end - start, 0) for offset, length, _ in requests
                    for start, end in self.territory.outside(offset, offset + length)]
        if any(self.territory.touches(offset, offset + length) for offset, length, _ in requests):
            self.is_broken = True
        return requests

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
