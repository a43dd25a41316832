# SPDX-License-Identifier: Apache-2.0
"""Chunks in memory: fetched by threads, kept by name, in a fixed number of slots.

The servers work in one thread; what takes long (the store, decryption, decompression) is done by others, several at a
time. Chunks are known by their contents, so all exports of a server share what any of them has fetched. Memory is
bounded by the slots whatever is asked for: a chunk being fetched takes one, too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from errno import EIO
from typing import Protocol

from stasis.linux.iobuffer import IoBuffer

__all__ = ["DEFAULT_LIMIT", "ChunkCache", "Ended", "Key", "Piece", "Reader"]

DEFAULT_LIMIT = 64 << 20
"""Bytes of chunks that are kept; with 1 MiB chunks that is enough for read-ahead of several clients."""
_MINIMUM_SLOTS = 4
_PATIENCE = 0.5
"""Seconds after which a wait looks again whether the server ends: a signal handler cannot wake it."""

Key = tuple[bytes, int]
"""Name of a chunk, and its length in bytes."""
Piece = tuple[Key, int, int, int]
"""(chunk, first byte in it, number of bytes, where they go in the buffer)."""


class Ended(OSError):
    """The server ends while somebody waits for a chunk."""


class Reader(Protocol):
    """What fetches a chunk; a thread has one of its own."""

    def fetch(self, name: bytes, into: memoryview) -> None: ...


class _Slot:
    """Room for one chunk. `pins` counts those who wait for it or read it; it is theirs as long."""

    __slots__ = ("error", "key", "pins", "ready", "started", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.key: Key = (b"", 0)
        self.started = self.ready = False
        self.error: BaseException | None = None
        self.pins = 0


class ChunkCache:
    """`copy()` brings pieces of chunks into a buffer, `prefetch()` has a chunk fetched if that costs nobody a slot.

    Only one thread may call these two. `threads` is how many chunks are fetched at a time.
    """

    def __init__(
        self, open_reader: Callable[[], Reader], chunk_size: int, *, limit: int = DEFAULT_LIMIT, threads: int = 2
    ) -> None:
        count = max(_MINIMUM_SLOTS, limit // chunk_size)
        self._open_reader = open_reader
        self._buffer = IoBuffer(count * chunk_size)
        view = self._buffer.view
        self._free = [_Slot(view[number * chunk_size : (number + 1) * chunk_size]) for number in range(count)]
        self._slots: OrderedDict[Key, _Slot] = OrderedDict()
        self._urgent: deque[_Slot] = deque()
        self._ahead: deque[_Slot] = deque()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._closed = False
        self.window = count // 2
        """Chunks that `copy()` uses at a time, and that may be prefetched at a time."""
        self._threads = [
            threading.Thread(target=self._fetch, name=f"fetch-{number}", daemon=True)
            for number in range(max(1, min(threads, self.window)))
        ]
        for thread in self._threads:
            thread.start()

    def copy(self, pieces: Sequence[Piece], view: memoryview) -> None:
        """Bring the pieces into the buffer. Raises what fetching one of their chunks raised."""
        window: dict[Key, list[Piece]] = {}
        for piece in pieces:
            if piece[0] not in window and len(window) == self.window:
                self._copy(window, view)
                window = {}
            window.setdefault(piece[0], []).append(piece)
        self._copy(window, view)

    def _copy(self, window: dict[Key, list[Piece]], view: memoryview) -> None:
        slots: list[_Slot] = []
        try:
            for key in window:
                slots.append(self._pin(key))
            for slot, pieces in zip(slots, window.values(), strict=True):
                self._wait(slot)
                for _, start, length, position in pieces:
                    view[position : position + length] = slot.view[start : start + length]
        finally:
            self._unpin(slots)

    def prefetch(self, key: Key) -> bool:
        """Have a chunk fetched in the background; False when no slot is to be had for it now."""
        with self._lock:
            if key in self._slots:
                return True
            if self._closed or len(self._ahead) >= self.window:
                return False
            slot = self._take()
            if slot is not None:
                self._request(slot, key, self._ahead)
            return slot is not None

    def abort(self) -> None:
        """Let a `copy()` that waits fail with EIO soon. For signal handlers: it takes no lock."""
        self._closed = True

    def close(self) -> None:
        """Stop the threads. One in the middle of a fetch ends when that does; nobody waits for it."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
        self._buffer.close()

    def _pin(self, key: Key) -> _Slot:
        with self._lock:
            slot = self._slots.get(key)
            if slot is None:
                while (slot := self._take()) is None:  # all others are being prefetched
                    self._pause()
                self._request(slot, key, self._urgent)
            else:
                self._slots.move_to_end(key)
                if not slot.started:
                    self._urgent.append(slot)  # and stays in the other queue, where it is passed over
            slot.pins += 1
            return slot

    def _wait(self, slot: _Slot) -> None:
        with self._lock:
            while not slot.ready:
                self._pause()
            if slot.error is not None:
                raise slot.error

    def _pause(self) -> None:
        if self._closed:
            raise Ended(EIO, "the server ends")
        self._done.wait(_PATIENCE)

    def _unpin(self, slots: Sequence[_Slot]) -> None:
        with self._lock:
            for slot in slots:
                slot.pins -= 1
                if not slot.pins and slot.ready and slot.error is not None:
                    self._free.append(slot)

    def _take(self) -> _Slot | None:
        """A slot that is free, else the one whose chunk was not used for longest; None if all are in use."""
        if self._free:
            return self._free.pop()
        for key, slot in self._slots.items():
            if slot.ready and not slot.pins:
                del self._slots[key]
                return slot
        return None

    def _request(self, slot: _Slot, key: Key, queue: deque[_Slot]) -> None:
        slot.key, slot.started, slot.ready, slot.error = key, False, False, None
        self._slots[key] = slot
        queue.append(slot)
        self._work.notify()

    # In the threads.

    def _fetch(self) -> None:
        reader: Reader | None = None
        while (slot := self._next()) is not None:
            error: BaseException | None = None
            name, length = slot.key
            try:
                reader = reader or self._open_reader()
                reader.fetch(name, slot.view[:length])
            except Exception as failure:  # it is raised again where somebody waits for the chunk
                error = failure
            self._finish(slot, error)

    def _next(self) -> _Slot | None:
        with self._lock:
            while not self._closed:
                queue = self._urgent or self._ahead
                if not queue:
                    self._work.wait()
                elif not (slot := queue.popleft()).started:
                    slot.started = True
                    return slot
            return None

    def _finish(self, slot: _Slot, error: BaseException | None) -> None:
        """A chunk that cannot be had is forgotten, so that the next who wants it makes another attempt."""
        with self._lock:
            slot.ready, slot.error = True, error
            if error is not None:
                del self._slots[slot.key]
                if not slot.pins:
                    self._free.append(slot)
            self._done.notify_all()

