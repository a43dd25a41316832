# SPDX-License-Identifier: Apache-2.0
"""Raw bytes that follow some records: the contents of pipes, sockets, ghost files, IPC objects and BPF maps.

A record's payload is a list of parts. How large they are is told by the record, except for two kinds: each message of
an IPC queue, and each chunk of a ghost file, brings a small message of its own before its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from stasis.process.images.kinds import Kind

__all__ = ["WITH_PAYLOAD", "Frames", "Part", "Size", "frames", "round_up", "sizes"]


class Part(NamedTuple):
    """Bytes behind a record: where they lie in the file, and the IpcMsg or GhostChunkEntry before them, if any."""

    name: str
    offset: int
    size: int
    message: Any = None


class Size(NamedTuple):
    """How large a part is, in bytes, and how many bytes it takes in the file."""

    name: str
    size: int
    padded: int


def round_up(size: int, unit: int) -> int:
    """`size` as whole units."""
    return -(-size // unit) * unit


def _one(size: int) -> list[Size]:
    return [Size("", size, size)]


def _map(entry: Any) -> list[Size]:
    return [Size("keys", entry.keys_bytes, entry.keys_bytes), Size("values", entry.values_bytes, entry.values_bytes)]


def _queues(entry: Any) -> list[Size]:
    return [Size("inq", entry.inq_len, entry.inq_len), Size("outq", entry.outq_len, entry.outq_len)]


# The parts of the kinds whose records tell their sizes.
_LAYOUTS: Final[dict[str, Callable[[Any], list[Size]]]] = {
    "pipes-data": lambda entry: _one(entry.bytes),
    "fifo-data": lambda entry: _one(entry.bytes),
    "sk-queues": lambda entry: _one(entry.length),
    "stasis-datagrams": lambda entry: _one(entry.length),
    "stasis-ipcns-mq": lambda entry: _one(entry.length),
    "tcp-stream": _queues,
    "ipcns-shm": lambda entry: [] if entry.in_pagemaps else [Size("", entry.size, round_up(entry.size, 4))],
    "ipcns-sem": lambda entry: [Size("", entry.nsems * 2, round_up(entry.nsems * 2, 8))],
    "bpfmap-data": _map,
}


class Frames(NamedTuple):
    """Parts that each begin with a message of their own: of which class, how many (None: until the end), how large."""

    message_path: str
    number: int | None
    size: Callable[[Any], Size]


def frames(kind: Kind, record: Any) -> Frames | None:
    """How the parts behind a record of an IPC queue or of a ghost file in chunks are framed; None for all others."""
    if kind.name == "ipcns-msg":
        return Frames("ipc.IpcMsg", record.qnum, lambda message: Size("", message.msize, round_up(message.msize, 8)))
    if kind.name == "ghost-file" and getattr(record, "chunks", None):
        return Frames("files.GhostChunkEntry", None, lambda chunk: Size("", chunk.len, chunk.len))
    return None


WITH_PAYLOAD: Final = {*_LAYOUTS, "ipcns-msg", "ghost-file"}
"""The kinds that have raw bytes behind their records."""


def sizes(kind: Kind, record: Any, rest: int) -> list[Size]:
    """The parts behind a record of any other kind; `rest` is how many bytes a ghost file without chunks has."""
    if kind.name == "ghost-file":
        return _one(rest)
    layout = _LAYOUTS.get(kind.name)
    return [] if layout is None else layout(record)
