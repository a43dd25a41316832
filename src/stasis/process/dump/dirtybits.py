# SPDX-License-Identifier: Apache-2.0
"""Which pages of a stopped process were written, by soft-dirty bits: what is done before Linux 6.7.

docs/design/process-incremental.md says why no page is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stasis.linux import softdirty, userfaultfd
from stasis.process.dump.changes import Changes

if TYPE_CHECKING:
    from stasis.linux.pagemap import PageScanner
    from stasis.linux.procfs import Mapping

__all__ = ["clear", "look"]

MERGEABLE = "mg"


def clear(scanner: PageScanner, pid: int, fd: int, watched: Sequence[Mapping]) -> dict[int, bytes]:
    """The states of the pages of each mapping by its start, and none has its bit any more.

    `fd`: the userfaultfd by which the mappings are registered. Looking and clearing are two steps. Between them nobody
    writes to a page that is there, also from outside; what appears between them counts as written.
    """
    with _held(fd, watched):
        before = {mapping.start: softdirty.states(scanner, mapping.start, mapping.end) for mapping in watched}
        softdirty.clear(pid)
        return {
            mapping.start: softdirty.joined(
                before[mapping.start], softdirty.states(scanner, mapping.start, mapping.end)
            ) for mapping in watched
        }  # fmt: skip


@contextmanager
def _held(fd: int, watched: Sequence[Mapping]) -> Iterator[None]:
    """Take the right to write from all pages. Also from those that are just being moved in memory: clearing the bit of
    such a page would leave it writable without a fault."""
    try:
        for mapping in watched:
            userfaultfd.hold(fd, mapping.start, mapping.length)
        yield
    finally:
        for mapping in watched:
            userfaultfd.forget(fd, mapping.start, mapping.length)


def look(scanner: PageScanner, mapping: Mapping) -> Changes | None:
    """What was written of a mapping since its bits were cleared; None where equal pages may have been merged: these
    lose their bit."""
    if MERGEABLE in mapping.flags:
        return None
    return Changes(softdirty.runs(softdirty.states(scanner, mapping.start, mapping.end), mapping.start))
