# SPDX-License-Identifier: Apache-2.0
"""Chunks: content that is stored under a digest of itself, so that what is there already is never stored again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stasis.backup.repo.index import ZERO
from stasis.backup.repo.objects import FRAME_BYTES, Codec, Keys, Kind
from stasis.backup.repo.store import Store
from stasis.errors import NotFoundError

__all__ = ["ChunkReader", "ChunkWriter", "Namer", "StoredChunk", "object_name"]

FOLDERS = {Kind.CHUNK: "chunks", Kind.SEGMENT: "segments"}


def object_name(kind: Kind, name: bytes) -> str:
    """Where content of this name lies in the store."""
    text = name.hex()
    return f"{FOLDERS[kind]}/{text[:2]}/{text}"


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """Where content went. stored_bytes: what it took in the store, 0 when it was there already or is ZERO."""

    name: bytes
    stored_bytes: int

    @property
    def new(self) -> bool:
        return self.stored_bytes > 0


class Namer:
    """Names content. May be used from any thread."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._zeroes: dict[int, bytes] = {}

    def __call__(self, data: memoryview | bytes | bytearray) -> bytes:
        """Name of a chunk, ZERO where it holds nothing but zeroes."""
        # Comparing digests beats looking for a byte that is not zero: BLAKE3 reads 8 GB/s here, memoryview's == 0.1.
        name = self._keys.digest(Kind.CHUNK, data)
        length = len(data)
        if length not in self._zeroes:
            self._zeroes[length] = self._keys.digest(Kind.CHUNK, bytes(length))
        return ZERO if name == self._zeroes[length] else name


class ChunkWriter:
    """Stores chunks. A thread has one of its own; what it stored is certain to be there after `Repository.sync`."""

    def __init__(self, store: Store, codec: Codec, namer: Namer, known: Callable[[bytes], bool]) -> None:
        self._store = store
        self._codec = codec
        self._namer = namer
        self._known = known

    def store(self, data: memoryview) -> StoredChunk:
        """Store a chunk unless it is there. Raises StorageError and others of the store."""
        name = self._namer(data)
        if name == ZERO or self._known(name):
            return StoredChunk(name, 0)
        where = object_name(Kind.CHUNK, name)
        frame = self._codec.seal(Kind.CHUNK, where, data)
        return StoredChunk(name, len(frame) if self._store.stage(where, frame) else 0)


class ChunkReader:
    """Fetches chunks. A thread has one of its own."""

    def __init__(self, store: Store, codec: Codec, namer: Namer) -> None:
        self._store = store
        self._codec = codec
        self._namer = namer
        self._frame = memoryview(bytearray(0))

    def fetch(self, name: bytes, into: memoryview) -> None:
        """The chunk `name`, which is as long as `into`. Raises DamagedError, and leaves zeroes in `into` then."""
        if name == ZERO:
            into[:] = bytes(len(into))
            return
        where = object_name(Kind.CHUNK, name)
        if len(self._frame) < len(into) + FRAME_BYTES:
            self._frame = memoryview(bytearray(len(into) + FRAME_BYTES))
        try:
            size = self._store.get_into(where, [self._frame])
        except NotFoundError as error:
            raise self._codec.missing(where) from error
        if size > len(into) + FRAME_BYTES:
            raise self._codec.damaged(where, f"it is {size} bytes long")
        self._codec.unseal_into(Kind.CHUNK, where, self._frame[:size], into)
        # A writer that has the key could have stored anything under this name; the digest is the last word.
        if self._namer(into) != name:
            into[:] = bytes(len(into))
            raise self._codec.damaged(where, "its content has another digest")
