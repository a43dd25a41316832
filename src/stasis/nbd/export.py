# SPDX-License-Identifier: Apache-2.0
"""What the NBD server serves: the one interface between the protocol and the storage behind it.

The server collects the requests that one receive brought and hands them over as one batch, because a call per
batch and not per request is where its speed comes from. An export therefore sees lists of requests and the
buffer they live in.
"""

from __future__ import annotations

import abc
import errno
from collections.abc import Iterator, Sequence
from typing import Protocol

from stasis.linux.iobuffer import IoBuffer
from stasis.nbd import protocol as p

__all__ = ["Export", "ExportList", "ExportSource", "Request", "transmission_flags"]

Request = tuple[int, int, int]
"""(offset, length, position): bytes of the export, and the index of the data in the buffer, all in bytes."""

MAXIMUM_BLOCK = 32 << 20


class Export(abc.ABC):
    """A disk to be served. Attributes are set before the first client comes and then stay, `size` excepted.

    Requests that reach an export are inside `size`, not empty, multiples of `minimum_block`, allowed by
    `read_only` and by what `can_*` says. Errors are OSError; its errno goes to the client.
    """

    name: str = ""
    description: str = ""
    size: int = 0
    read_only: bool = False
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = MAXIMUM_BLOCK
    alignment: int = 1
    """Positions of reads are multiples of this (a power of two, at most a page): 1 packs replies densest."""
    can_multi_conn: bool = False
    """True only where `flush()` covers the writes of all connections (proto.md, NBD_FLAG_CAN_MULTI_CONN)."""
    can_trim: bool = False
    can_zero: bool = False
    can_fast_zero: bool = False
    can_cache: bool = False
    reports_holes: bool = False
    """True where `block_status("base:allocation")` is cheap enough to be asked at every structured read of 64
    KiB."""

    @abc.abstractmethod
    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        """Fill each request's place in the buffer. An error is an error of the whole batch: the server then
        asks again, one by one, so that every request gets its own errno."""

    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        """Write each request's data, in order where they overlap. After an error the batch comes again, one
        by one."""
        raise OSError(errno.EPERM, "export is read-only")

    def flush(self) -> None:
        """Make durable all that was written, trimmed or zeroed before, by whatever connection."""

    def trim(self, offset: int, length: int) -> Iterator[None]:
        """Discard. A generator: each step is bounded work, the server serves others in between."""
        raise OSError(errno.ENOTSUP, "trim is not offered")

    def write_zeroes(self, offset: int, length: int, *, punch: bool, fast: bool) -> Iterator[None]:
        """Make the range read as zeroes, in steps as `trim`. `punch`: it may become a hole. `fast`: raise
        OSError(ENOTSUP) before anything is done if this would be no faster than writing."""
        raise OSError(errno.ENOTSUP, "write zeroes is not offered")

    def cache(self, offset: int, length: int) -> None:
        """Start to bring the range into memory; need not wait for it."""

    def contexts(self) -> Sequence[str]:
        """The metadata contexts on offer, e.g. ("base:allocation", "qemu:dirty-bitmap:since-3")."""
        return ()

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) of consecutive extents from `offset` on: at least one, neighbours differ, together
        at most `length`. May stop early to bound the work."""
        raise OSError(errno.EINVAL, f"no context {context}")


class ExportSource(Protocol):
    """Where a server finds its exports; asked at every negotiation, so exports may come and go."""

    def list(self) -> Sequence[str]:
        """The names to show to NBD_OPT_LIST."""
        ...

    def find(self, name: str) -> Export | None:
        """The export of that name; None if there is none."""
        ...


class ExportList:
    """A fixed set of exports. The empty name stands for the only one, as NBD clients expect of a default
    export."""

    def __init__(self, *exports: Export) -> None:
        self._exports = {export.name: export for export in exports}

    def list(self) -> Sequence[str]:
        return tuple(self._exports)

    def find(self, name: str) -> Export | None:
        if name == "" and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)


def transmission_flags(export: Export, structured: bool) -> int:
    """The transmission flags of an export (proto.md, "Transmission flags")."""
    offers = (
        (export.read_only, p.NBD_FLAG_READ_ONLY),
        (structured, p.NBD_FLAG_SEND_DF),
        (export.can_multi_conn, p.NBD_FLAG_CAN_MULTI_CONN),
        (export.can_cache, p.NBD_FLAG_SEND_CACHE),
        (export.can_trim and not export.read_only, p.NBD_FLAG_SEND_TRIM),
        (export.can_zero and not export.read_only, p.NBD_FLAG_SEND_WRITE_ZEROES),
        (export.can_zero and export.can_fast_zero and not export.read_only, p.NBD_FLAG_SEND_FAST_ZERO),
    )
    flags = p.NBD_FLAG_HAS_FLAGS | p.NBD_FLAG_SEND_FLUSH | p.NBD_FLAG_SEND_FUA
    for offered, flag in offers:
        if offered:
            flags |= flag
    return flags
