# SPDX-License-Identifier: Apache-2.0
"""The frame around every object: what it is, how it is packed, and the proof that it belongs under its name.

Byte by byte in docs/formats/repository.md. The proof (a GCM tag, or a checksum where nothing is encrypted) covers the
header, the name and the content, so a flipped bit, a cut, and an object under another's name all show.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stasis.backup.repo.delta import objects_of
from stasis.backup.repo.store import LARGEST_OBJECT, Buffer
from stasis.errors import DamagedError

__all__ = ["FORMAT_VERSION", "FRAME_BYTES", "HEADER_BYTES", "TAG_BYTES", "Codec", "Header", "Keys",
           "Kind", "object_name"]

MAGIC = b"STASISRO"
FORMAT_VERSION = 1
HEADER = struct.Struct("<8s4B2I12s")  # magic, version, kind, packing, protection, plain and packed length, nonce
TAG_BYTES = 16
HEADER_BYTES = HEADER.size
FRAME_BYTES = HEADER_BYTES + TAG_BYTES
PACKED_NONE, PACKED_ZSTD = 0, 1
PLAIN, AES_256_GCM = 0, 1
NO_NONCE = bytes(12)

# Measured on 1 MiB of source text: level 1 makes 0.40 GB/s and a fourth of the size, -5 makes 0.46 and a third,
# 3 makes 0.27 and little less than 1. What does not get smaller passes at 9 GB/s.
LEVEL = 1
PROBE_PIECES = 8
PROBE_BYTES = 2048


class Kind(IntEnum):
    """What an object is."""

    CONFIG = 1
    KEY = 2
    CHUNK = 3
    SEGMENT = 4
    MANIFEST = 5
    TAGS = 6
    LOCK = 7
    DELTA = 8


FOLDERS = {Kind.CHUNK: "chunks", Kind.SEGMENT: "segments", Kind.DELTA: "chunks"}


def object_name(kind: Kind, name: bytes) -> str:
    """Where content lies in the store that is named by its digest; for a delta its pack."""
    text = (name if kind is Kind.SEGMENT else objects_of(name)).hex()
    return f"{FOLDERS[kind]}/{text[:2]}/{text}"


class Keys:
    """The keys of a repository, all derived from one; without it hashes are plain and nothing is encrypted."""

    def __init__(self, repository_key: bytes | None) -> None:
        self.encrypted = repository_key is not None
        self._key = repository_key
        self._subkeys = {kind: self._derive(f"names of {kind.name.lower()}s") for kind in Kind}
        self._content = self._derive("content")

    def _derive(self, purpose: str) -> bytes:
        if self._key is None:
            return b""
        return blake3(self._key, derive_key_context=f"stasis repository 1 {purpose}").digest()

    def digest(self, kind: Kind, data: Buffer) -> bytes:
        """Name of content, 32 bytes; tells nothing about the content to who has not the key."""
        key = self._subkeys[kind]
        return blake3(data, key=key).digest() if key else blake3(data).digest()

    def cipher(self, name: str) -> AESGCM:
        """The cipher of one object: a key of its own, so that random nonces have nothing to collide with."""
        return AESGCM(blake3(name.encode(), key=self._content).digest())


@dataclass(frozen=True, slots=True)
class Header:
    """The first 32 bytes of every object."""

    version: int
    kind: int
    packing: int
    protection: int
    length: int
    packed: int
    nonce: bytes

    @classmethod
    def parse(cls, frame: Buffer) -> Header | None:
        """None when this is no object at all."""
        if len(frame) < HEADER_BYTES:
            return None
        magic, *fields = HEADER.unpack_from(frame)
        return cls(*fields) if magic == MAGIC else None

    def packed_bytes(self) -> bytes:
        return HEADER.pack(MAGIC, self.version, self.kind, self.packing, self.protection, self.length, self.packed,
                           self.nonce)


class Codec:
    """Makes and opens frames. Holds its buffers, so that no job allocates per chunk; a thread has its own."""

    def __init__(self, keys: Keys, *, compress: bool, where: str) -> None:
        self.encrypted = keys.encrypted
        self.compresses = compress
        self._keys = keys
        self._where = where
        self._compressor = zstandard.ZstdCompressor(level=LEVEL) if compress else None
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_OBJECT)
        self._frame = memoryview(bytearray(0))
        self._packed = memoryview(bytearray(0))

    def seal(self, kind: Kind, name: str, data: Buffer) -> bytes:
        """The object for content."""
        return b"".join(self.seal_parts(kind, name, data))

    def seal_parts(self, kind: Kind, name: str, data: Buffer, digest: bytes | None = None) -> Sequence[Buffer]:
        """The object for content, in parts that are valid until the next call. `digest`: BLAKE3 of the content without
        a key, if it is known already."""
        packed = self._pack(data)
        body = data if packed is None else packed
        encrypted = self._keys.encrypted
        header = Header(FORMAT_VERSION, kind, PACKED_NONE if packed is None else PACKED_ZSTD,
                        AES_256_GCM if encrypted else PLAIN, len(data), len(body),
                        os.urandom(12) if encrypted else NO_NONCE).packed_bytes()
        if encrypted:
            return (self._encrypt(header, name, body),)
        if digest is None or packed is not None:
            digest = blake3(body).digest()
        return (header, body, _checksum(header, name, digest))

    def _encrypt(self, header: bytes, name: str, body: Buffer) -> memoryview:
        size = FRAME_BYTES + len(body)
        if len(self._frame) < size:
            self._frame = memoryview(bytearray(size))
        frame = self._frame[:size]
        frame[: HEADER_BYTES] = header
        self._keys.cipher(name).encrypt_into(header[-12:], body, header + name.encode(), frame[HEADER_BYTES :])
        return frame

    def unseal(self, kind: Kind, name: str, frame: Buffer) -> bytes:
        """The content of a small object. Raises DamagedError."""
        header = self._header(kind, name, frame)
        content = bytearray(header.length)
        self.unseal_into(kind, name, frame, memoryview(content))
        return bytes(content)

    def unseal_into(self, kind: Kind, name: str, frame: Buffer, into: memoryview) -> None:
        """Content whose length is known. Raises DamagedError; what is in `into` then is not to be used."""
        view = memoryview(frame)
        header = self._header(kind, name, view)
        if header.length != len(into):
            raise self.damaged(name, f"it holds {header.length} bytes instead of {len(into)}")
        body = view[HEADER_BYTES:-TAG_BYTES]
        if self._keys.encrypted:
            body = self._decrypt(header, name, view, into)
        elif _checksum(view[:HEADER_BYTES], name, blake3(body).digest()) != view[-TAG_BYTES:]:
            raise self.damaged(name, "its checksum does not fit")
        if header.packing == PACKED_ZSTD:
            self._unpack(name, body, into)
        elif not self._keys.encrypted:
            into[:] = body

    def verify_in_place(self, kind: Kind, name: str, head: memoryview, content: memoryview, tag: memoryview) -> bytes:
        """Check content that is neither encrypted nor compressed and was read to where it belongs; its BLAKE3.

        Raises DamagedError.
        """
        header = self._header(kind, name, head, FRAME_BYTES + len(content))
        digest = blake3(content).digest()
        if header.packing != PACKED_NONE or _checksum(head, name, digest) != tag:
            raise self.damaged(name, "its checksum does not fit")
        return digest

    def damaged(self, name: str, reason: str) -> DamagedError:
        """The error for an object that is not what it must be."""
        return DamagedError(f"{name} in the repository {self._where} is damaged: {reason}",
                            hint="stasis backup check lists everything that is damaged and the backups that need it")

    def missing(self, name: str) -> DamagedError:
        """The error for an object that must be there."""
        return DamagedError(f"{name} is missing in the repository {self._where}",
                            hint="stasis backup check lists everything that is missing and the backups that need it")

    def _header(self, kind: Kind, name: str, frame: Buffer, size: int | None = None) -> Header:
        header = Header.parse(frame)
        if header is None or header.version != FORMAT_VERSION:
            raise self.damaged(name, "it has no header")
        expected = AES_256_GCM if self._keys.encrypted else PLAIN
        if header.kind != kind or header.protection != expected or header.packing > PACKED_ZSTD:
            raise self.damaged(name, "it is not what belongs under this name")
        if header.packed != (len(frame) if size is None else size) - FRAME_BYTES or header.length > LARGEST_OBJECT:
            raise self.damaged(name, "its length is wrong")
        if header.packing == PACKED_NONE and header.packed != header.length:
            raise self.damaged(name, "its length is wrong")
        return header

    def _decrypt(self, header: Header, name: str, frame: memoryview, into: memoryview) -> memoryview:
        """The packed content: in `into` where it is not compressed."""
        if header.packing == PACKED_ZSTD:
            if len(self._packed) < header.packed:
                self._packed = memoryview(bytearray(header.packed))
            into = self._packed[: header.packed]
        try:
            self._keys.cipher(name).decrypt_into(
                header.nonce, frame[HEADER_BYTES :], bytes(frame[: HEADER_BYTES]) + name.encode(), into)
        except InvalidTag as error:
            raise self.damaged(name, "its tag does not fit") from error
        return into

    def _unpack(self, name: str, body: memoryview, into: memoryview) -> None:
        """Never gives more than `into` holds, whatever the content says."""
        try:
            with self._decompressor.stream_reader(body) as reader:
                filled = 0
                while filled < len(into) and (count := reader.readinto(into[filled:])):
                    filled += count
                if filled < len(into) or reader.read(1):
                    raise self.damaged(name, "it does not unpack to its length")
        except zstandard.ZstdError as error:
            raise self.damaged(name, "it does not unpack") from error

    def _pack(self, data: Buffer) -> memoryview | None:
        """The content compressed, None where that is not worth it."""
        if self._compressor is None or not self._worth_packing(memoryview(data)):
            return None
        packed = self._compressor.compress(data)
        return memoryview(packed) if len(packed) < len(data) - (len(data) >> 4) else None

    def _worth_packing(self, data: memoryview) -> bool:
        """Whether a few small pieces get smaller; what is compressed or encrypted already does not."""
        if len(data) <= 2 * PROBE_PIECES * PROBE_BYTES:
            return True
        step = (len(data) - PROBE_BYTES) // (PROBE_PIECES - 1)
        pieces = b"".join(data[start : start + PROBE_BYTES] for start in range(0, len(data), step))
        assert self._compressor is not None
        return len(self._compressor.compress(pieces)) < len(pieces) - (len(pieces) >> 4)


def _checksum(header: Buffer, name: str, digest: bytes) -> bytes:
    """Binds header, name and content together where there is no key: finds accidents, no intent."""
    return blake3(bytes(header) + name.encode() + digest).digest()[:TAG_BYTES]
