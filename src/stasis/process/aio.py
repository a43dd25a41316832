# SPDX-License-Identifier: Apache-2.0
"""Rings of asynchronous I/O (io_setup(2)): their address is their name, so they come back where they were.

A ring is memory that the kernel fills with events. It comes back empty; one with events that were not fetched is
refused, also when they come between the look at the tree and the writing. The kernel tells nobody of requests that are
still under way: what they do is done, and their events are lost.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from stasis.errors import UnsupportedError
from stasis.process.images.damage import damaged
from stasis.process.images.schema.memory import AioRingEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stasis.linux.procfs import Mapping
    from stasis.linux.taskmem import TaskMemory
    from stasis.process.remote import Remote

__all__ = ["make_rings", "ring_of", "why_lost"]

RING = struct.Struct("<8I")  # fs/aio.c, struct aio_ring: id, nr, head, tail, magic, compat, incompat, header length
MAGIC = 0xA10A10A1
EVENT_BYTES = 32
LARGEST_RING = 1 << 32
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
PAGE = 4096
TRIES = 64


def why_lost(memory: TaskMemory, mapping: Mapping) -> str:
    """Why a ring cannot be kept; "" where it can."""
    fields = RING.unpack(memory.read(mapping.start, RING.size))
    if fields[4] != MAGIC:
        return "it is a part of an asynchronous I/O ring"
    return "" if fields[2] == fields[3] else "it is an asynchronous I/O ring with events that were not fetched yet"


def ring_of(memory: TaskMemory, mapping: Mapping) -> AioRingEntry:
    """The message for a ring. UnsupportedError where something has come into it since it was looked at."""
    if reason := why_lost(memory, mapping):
        raise UnsupportedError(f"process {memory.pid}: memory at {mapping.start:#x}: {reason}",
                               hint="requests were under way; dump again")  # fmt: skip
    # io_setup() doubles what it is asked for, and adds two (ioctx_alloc, aio_setup_ring).
    places = RING.unpack(memory.read(mapping.start, RING.size))[1]
    return AioRingEntry(id=mapping.start, nr_req=max((places - 2) // 2, 1), ring_len=mapping.length)


def make_rings(remote: Remote, rings: Sequence[AioRingEntry]) -> None:
    """In a process that has its other memory already."""
    for ring in rings:
        fits = 0 < ring.ring_len <= LARGEST_RING and 0 < ring.nr_req <= ring.ring_len // EVENT_BYTES
        if ring.id % PAGE or not fits:
            raise damaged("mm", 0, f"there cannot be an asynchronous I/O ring at {ring.id:#x}")
        _move(remote, _made(remote, ring), ring)


def _made(remote: Remote, ring: AioRingEntry) -> int:
    """Address of a new ring of the same length. What was asked for is not known, only what came of it."""
    wanted = ring.nr_req
    for _ in range(TRIES):
        remote.memory.write(remote.scratch, bytes(8))
        remote.call("io_setup", wanted, remote.scratch)
        (made,) = remote.get_words("<Q")
        places = RING.unpack(remote.memory.read(made, RING.size))[1]
        length = -(-(places * EVENT_BYTES + RING.size) // PAGE) * PAGE
        if length == ring.ring_len:
            return int(made)
        remote.call("io_destroy", made)
        wanted += -1 if length > ring.ring_len else 1
        if not wanted:
            break
    raise UnsupportedError(f"the asynchronous I/O ring at {ring.id:#x} of process {remote.pid} cannot be made with "
                           "its length", hint="restore it on a machine with as many processors")  # fmt: skip


def _move(remote: Remote, made: int, ring: AioRingEntry) -> None:
    if made != ring.id:
        remote.call("mremap", made, ring.ring_len, ring.ring_len, MREMAP_MAYMOVE | MREMAP_FIXED, ring.id)
