# SPDX-License-Identifier: Apache-2.0
"""Frames of objects: fixed bytes, round trips, and that no alteration passes."""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from stasis.backup.repo import objects
from stasis.backup.repo.objects import FRAME_BYTES, Codec, Header, Keys, Kind
from stasis.errors import DamagedError

KEY = bytes(range(32))
NAME = "chunks/ab/" + "ab" * 32

protections = st.sampled_from([None, KEY])
contents = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda piece, times: piece * times, st.binary(min_size=1, max_size=40), st.integers(1, 5000)),
    st.builds(lambda seed, size: b"".join(hashlib.sha256(b"%d %d" % (seed, n)).digest() for n in range(size)),
              st.integers(0, 9), st.integers(1, 2000)),
)


def codec(key: bytes | None = KEY, *, compress: bool = True) -> Codec:
    return Codec(Keys(key), compress=compress, where="here")


@given(protections, st.booleans(), contents, st.sampled_from(Kind))
def test_what_is_sealed_is_unsealed(key: bytes | None, compress: bool, content: bytes, kind: Kind) -> None:
    frame = codec(key, compress=compress).seal(kind, NAME, content)
    assert codec(key).unseal(kind, NAME, frame) == content
    assert len(frame) <= len(content) + FRAME_BYTES


@given(protections, st.booleans(), contents, st.data())
def test_no_flipped_bit_passes(key: bytes | None, compress: bool, content: bytes, data: Any) -> None:
    frame = bytearray(codec(key, compress=compress).seal(Kind.CHUNK, NAME, content))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedError, match=NAME):
        codec(key).unseal(Kind.CHUNK, NAME, frame)


@given(protections, contents, st.data())
def test_no_cut_and_no_addition_passes(key: bytes | None, content: bytes, data: Any) -> None:
    frame = codec(key).seal(Kind.CHUNK, NAME, content)
    cut = data.draw(st.integers(0, len(frame) - 1))
    for altered in (frame[:cut], frame + b"\0", frame + frame):
        with pytest.raises(DamagedError, match=NAME):
            codec(key).unseal(Kind.CHUNK, NAME, altered)


@pytest.mark.parametrize("key", [None, KEY])
def test_an_object_is_bound_to_its_name_and_kind(key: bytes | None) -> None:
    frame = codec(key).seal(Kind.MANIFEST, "backups/one", b"content")
    with pytest.raises(DamagedError, match="backups/two"):
        codec(key).unseal(Kind.MANIFEST, "backups/two", frame)
    with pytest.raises(DamagedError, match="backups/one"):
        codec(key).unseal(Kind.TAGS, "backups/one", frame)


def test_another_repository_s_object_is_refused() -> None:
    frame = codec(KEY).seal(Kind.CHUNK, NAME, b"content")
    with pytest.raises(DamagedError):
        codec(bytes(32)).unseal(Kind.CHUNK, NAME, frame)


def test_a_readable_object_is_refused_where_all_is_encrypted() -> None:
    with pytest.raises(DamagedError):
        codec(KEY).unseal(Kind.CHUNK, NAME, codec(None).seal(Kind.CHUNK, NAME, b"content"))
    with pytest.raises(DamagedError):
        codec(None).unseal(Kind.CHUNK, NAME, codec(KEY).seal(Kind.CHUNK, NAME, b"content"))


def test_the_same_content_never_makes_the_same_object() -> None:
    sealer = codec(KEY)
    assert len({sealer.seal(Kind.CHUNK, NAME, b"content") for _ in range(50)}) == 50


def test_a_bomb_does_not_unpack() -> None:
    """Whoever can write to a repository without a key can make any frame: it must not take memory."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    for length in (10, 1 << 20):
        header = Header(1, Kind.CHUNK, objects.PACKED_ZSTD, objects.PLAIN, length, len(bomb), bytes(12)).packed_bytes()
        tag = objects._checksum(header, NAME, objects.blake3(bomb).digest())
        with pytest.raises(DamagedError, match="unpack"):
            codec(None).unseal(Kind.CHUNK, NAME, header + bomb + tag)


def test_a_length_beyond_reason_is_refused_before_memory_is_taken() -> None:
    frame = bytearray(codec(None).seal(Kind.MANIFEST, NAME, b"x" * 100))
    struct.pack_into("<I", frame, 12, 0xFFFFFFFF)
    with pytest.raises(DamagedError, match="length"):
        codec(None).unseal(Kind.MANIFEST, NAME, frame)


def test_content_that_does_not_get_smaller_is_stored_as_it_is() -> None:
    noise = os.urandom(1 << 20)
    assert len(codec(None).seal(Kind.CHUNK, NAME, noise)) == len(noise) + FRAME_BYTES
    assert len(codec(None).seal(Kind.CHUNK, NAME, noise[: 1 << 19] + bytes(1 << 19))) < (1 << 19) + 4096
    assert len(codec(None, compress=False).seal(Kind.CHUNK, NAME, bytes(1 << 20))) == (1 << 20) + FRAME_BYTES


def test_names_differ_by_key_and_kind() -> None:
    def names(key: bytes | None) -> list[bytes]:
        return [Keys(key).digest(kind, b"content") for kind in (Kind.CHUNK, Kind.SEGMENT, Kind.MANIFEST)]

    assert len({*names(KEY), *names(bytes(32)), *names(None)}) == 3 + 3 + 1


# Fixed bytes: docs/formats/repository.md is right as long as these hold.

PLAIN_FRAME = bytes.fromhex("""
    535441534953524f 01 03 00 00 05000000 05000000 000000000000000000000000
    68656c6c6f be2dfa67cce00ede63084c1c2492390c""")
ENCRYPTED_FRAME = bytes.fromhex("""
    535441534953524f 01 03 00 01 05000000 05000000 000102030405060708090a0b
    7feea244c5 b427ca0b4d8e05bf4629971aaba6aab6""")


def test_a_readable_object_has_these_bytes() -> None:
    assert codec(None).seal(Kind.CHUNK, NAME, b"hello") == PLAIN_FRAME


def test_an_encrypted_object_of_these_bytes_is_read() -> None:
    assert codec(KEY).unseal(Kind.CHUNK, NAME, ENCRYPTED_FRAME) == b"hello"


@pytest.mark.parametrize(("key", "kind", "digest"), [
    (None, Kind.CHUNK, "ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f"),
    (KEY, Kind.CHUNK, "a2be8f6bfc7a83ab3af90c8e0732db14d94e8fa87f199f99050c693f58f05f95"),
    (KEY, Kind.SEGMENT, "bae0bd0db00a0c9619b23c24857581c136fd3d48ac69bddc45c0efec187145db"),
    (KEY, Kind.MANIFEST, "9b60c4d327ba4a98bab56a751895e5bd61caec05f3f75482d0e4d4f20b0bdec8"),
])
def test_names_have_these_bytes(key: bytes | None, kind: Kind, digest: str) -> None:
    assert Keys(key).digest(kind, b"hello").hex() == digest
