# SPDX-License-Identifier: Apache-2.0
"""Soft-dirty bits: which pages were written since all bits of an address space were cleared (Linux 3.11, an option).

Documentation/admin-guide/mm/soft-dirty.rst. A kernel that was built without them takes the order to clear and does
nothing, and shows every page as not written: who uses them has to see a bit that is set.
"""

import re
from collections.abc import Iterator

from stasis.linux import procfs
from stasis.linux.pagemap import EXCLUSIVE, FILE_OR_SHARED, PAGE, PRESENT, SWAPPED, Change, PageScanner

__all__ = ["clear", "is_set", "joined", "runs", "states"]

CLEAR_SOFT_DIRTY = "4"  # fs/proc/task_mmu.c, CLEAR_REFS_SOFT_DIRTY
SOFT_DIRTY = 1 << 7  # bit 55: of the last byte but one

OWN, TOUCHED = 1, 2
"""What a byte of `states` says of a page: it has contents of its own; these may have changed."""


def _own(upper: int) -> int:
    """Of the bits 56 to 63 of an entry. Only a page that is swapped or mapped exactly once cannot be the zero page,
    which nobody has to write to for its being there instead of something else."""
    if not upper & (PRESENT | SWAPPED) or upper & FILE_OR_SHARED:
        return 0
    return OWN if upper & (SWAPPED | EXCLUSIVE) else OWN | TOUCHED


OWN_BY_UPPER = bytes(map(_own, range(256)))
TOUCHED_BY_LOWER = bytes(TOUCHED if lower & SOFT_DIRTY else 0 for lower in range(256))
APPEARED = bytes(state | TOUCHED if state & OWN else 0 for state in range(256))
RUN = re.compile(rb"\x01+|\x03+")


def clear(pid: int) -> None:
    """Clear the bits of all memory of a process. Pages that a device writes to keep theirs (commit 9348b73c2e1b)."""
    procfs.write(pid, "clear_refs", CLEAR_SOFT_DIRTY)


def is_set(scanner: PageScanner, address: int) -> bool:
    """Whether a page's bit is set."""
    ((_, raw),) = scanner.entries(address, address + PAGE)
    return bool(raw[6] & SOFT_DIRTY)


def states(scanner: PageScanner, start: int, end: int) -> bytes:
    """A byte for each page of private memory: `OWN` and `TOUCHED`."""
    found = []
    for _, raw in scanner.entries(start, end):
        found.append(_either(raw[7::8].translate(OWN_BY_UPPER), raw[6::8].translate(TOUCHED_BY_LOWER)))
    return b"".join(found)


def joined(before: bytes, after: bytes) -> bytes:
    """States as they were, with pages that appeared since as written."""
    return _either(before, bytes(map(_appeared, before, after)) if _masked(before) != _masked(after) else before)


def _appeared(before: int, after: int) -> int:
    return APPEARED[after] if not before & OWN else 0


def _masked(found: bytes) -> bytes:
    return found.translate(OWN_MASK)


OWN_MASK = bytes(state & OWN for state in range(256))


def _either(one: bytes, other: bytes) -> bytes:
    """Bit by bit; the same length. Whole numbers are the quick way."""
    both = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return both.to_bytes(len(one), "little")


def runs(found: bytes, start: int) -> Iterator[Change]:
    """The states of a range as runs of pages that have contents of their own, in order of address."""
    for run in RUN.finditer(found):
        length = (run.end() - run.start()) * PAGE
        yield start + run.start() * PAGE, length, bool(found[run.start()] & TOUCHED)
