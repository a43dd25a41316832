# SPDX-License-Identifier: Apache-2.0
"""The device as it was at the snapshot, as an NBD export `dattoN`; read-only, as dattobd's device is."""

from __future__ import annotations

from collections.abc import Sequence

from stasis.block.origin import Request
from stasis.datto.tracer import Tracer
from stasis.datto.update import describe
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.export import Export

__all__ = ["TracerImage"]


class TracerImage(Export):
    """Served by the worker that also writes the COW file, between its batches: so nothing changes during a read."""

    read_only = True
    can_multi_conn = True

    def __init__(self, name: str, tracer: Tracer) -> None:
        self.name = name
        self.size = tracer.cow.geometry.size
        self.alignment = tracer.origin.sector if tracer.origin.direct else 1
        self._tracer = tracer
        header = tracer.cow.header
        self._said = describe(header.uuid, header.seqid)

    @property
    def description(self) -> str:  # type: ignore[override]
        """The place in its series, for `update-img`; of a snapshot that failed, that it did."""
        return "failed dattobd snapshot" if self._tracer.error else self._said

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        self._tracer.read_image(buffer, requests)
