# SPDX-License-Identifier: Apache-2.0
"""A stream comes from outside: whatever is wrong in it gives one sentence, and nothing of it becomes a backup."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.repo import Repository
from stasis.backup.streams.receive import open_stream, receive
from stasis.backup.streams.send import send
from stasis.errors import DamagedError, StasisError
from tests.backup.stored import CHUNK, backup_of

NAME = struct.pack("<I", 4) + b"name"
SIZE = struct.pack("<Q", 1 << 20)


def record(tag: bytes, content: bytes) -> bytes:
    return tag + struct.pack("<Q", len(content)) + content


def extent(tag: bytes, offset: int, length: int, data: bytes = b"") -> bytes:
    return record(tag, struct.pack("<QQ", offset, length) + data)


HEAD = b"rbd diff v2\n" + record(b"t", NAME) + record(b"s", SIZE)


def closed(stream: bytes) -> bytes:
    """The stream with its digest and end."""
    return stream + record(b"D", blake3(stream).digest()) + b"e"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    folder = tmp_path_factory.mktemp("hostile")
    with Repository.init(str(folder / "r"), secret=None, chunk_size=CHUNK) as opened:
        yield opened


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A stream that is right, unpacked, with data and zeroes."""
    folder = tmp_path_factory.mktemp("sound")
    with Repository.init(str(folder / "r"), secret=None, chunk_size=CHUNK) as opened:
        backup = backup_of(opened, b"data" * 100 + bytes(3 * CHUNK) + b"end")
        send(opened, backup, None, sink := io.BytesIO())
    return zstandard.ZstdDecompressor().decompressobj().decompress(sink.getvalue())


def read(stream: bytes) -> list[tuple[int, int]]:
    opened = open_stream(io.BufferedReader(io.BytesIO(stream)))
    return [(offset, length) for offset, length, _ in opened.pieces()]


def refusal(stream: bytes) -> str:
    with pytest.raises(DamagedError) as caught:
        read(stream)
    assert "\n" not in caught.value.message
    return caught.value.message


WRONG = {
    "is no backup stream": b"rbd diff v1\n" + HEAD[12:],
    "at byte 25: it ends in the middle": HEAD[:25],
    "at byte 46: a second record of kind s": HEAD + record(b"s", SIZE),
    "at byte 29: size or name of the backup are missing": closed(b"rbd diff v2\n" + record(b"t", NAME)),
    "at byte 12: a record of 9 bytes, where 8 to 8 are possible": b"rbd diff v2\n" + record(b"s", SIZE + b"x"),
    "at byte 12: a record of 4294967296 bytes": b"rbd diff v2\nt" + struct.pack("<Q", 1 << 32),
    "is larger than any": closed(b"rbd diff v2\n" + record(b"t", NAME) + record(b"s", b"\xff" * 8)),
    "is no text": closed(b"rbd diff v2\n" + record(b"t", NAME[:-1] + b"\xff") + record(b"s", SIZE)),
    "no text of the length": closed(b"rbd diff v2\n" + record(b"t", NAME + b"more") + record(b"s", SIZE)),
    "at byte 46: an empty extent": closed(HEAD + extent(b"z", 0, 0)),
    "at byte 71: offset 4, though the data before it goes to 8":
        closed(HEAD + extent(b"z", 0, 8) + extent(b"z", 4, 8)),
    "8 bytes at 1048570 are not within the device": closed(HEAD + extent(b"z", (1 << 20) - 6, 8)),
    "bytes at 18446744073709551615 are not within": closed(HEAD + extent(b"z", (1 << 64) - 1, (1 << 64) - 1)),
    "a record of 20 bytes for an extent of 5": closed(HEAD + extent(b"w", 0, 5, b"four")),
    "a record of 17 bytes for an extent of 4": closed(HEAD + extent(b"z", 0, 4, b"x")),
    "has no room for an extent": closed(HEAD + record(b"w", b"short")),
    "at byte 71: a record out of its place": closed(HEAD + extent(b"z", 0, 8) + record(b"s", SIZE)),
    "at byte 46: the stream has no digest at its end": HEAD + b"e",
    "the digest is not that of the stream": HEAD + record(b"D", bytes(32)) + b"e",
    "at byte 87: something follows the digest": closed(HEAD)[:-1] + record(b"x", b""),
    "something follows the end": closed(HEAD) + b"e",
}


@pytest.mark.parametrize("expected", WRONG, ids=lambda text: text.replace(" ", "-")[:40])
def test_what_is_wrong_is_said_with_its_place(expected: str) -> None:
    assert expected in refusal(WRONG[expected])


def test_records_that_are_not_known_are_skipped() -> None:
    later = record(b"\xfe", b"of a later version")
    stream = HEAD + later + later + extent(b"z", 8, 8) + later
    assert read(closed(stream)) == [(8, 8)]


def test_every_cut_is_noticed(sound: bytes) -> None:
    assert read(sound)
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(sound)
    for cut in range(0, len(sound), 97):
        refusal(sound[:cut])
    for cut in range(len(packed) - 5):
        refusal(packed[:cut])


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), packed=st.booleans())
def test_no_flipped_bit_becomes_data(sound: bytes, place: float, bit: int, packed: bool) -> None:
    """A bit that zstd does not use may be flipped: then the content is that of the sound stream."""
    altered = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(sound) if packed else sound)
    altered[int(place * len(altered))] ^= 1 << bit
    try:
        assert read(bytes(altered)) == read(sound)
        assert packed
    except DamagedError as error:
        assert "\n" not in error.message


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_noise_is_refused_at_once(noise: bytes) -> None:
    refusal(noise)
    refusal(HEAD + noise)


def test_a_stream_that_unpacks_to_gigabytes_takes_no_memory_and_no_trust() -> None:
    """Four bytes of zstd can stand for 128 KiB; one that is asked to keep a window of 2 GiB is refused."""
    bomb = zstandard.ZstdCompressor(level=1).compressobj()
    packed = bomb.compress(HEAD + b"x" + struct.pack("<Q", 64 << 20))
    packed += b"".join(bomb.compress(bytes(1 << 20)) for _ in range(63)) + bomb.flush()
    assert len(packed) < 100000
    assert "it ends in the middle" in refusal(packed)
    wide = zstandard.ZstdCompressionParameters(window_log=31, write_checksum=True)
    window = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    assert "cannot be unpacked" in refusal(window.compress(closed(HEAD)) + window.flush())


@pytest.mark.parametrize("change", [
    {"host": ""}, {"device": "\x1b[2J"}, {"device": "x" * 300}, {"time": "yesterday"}, {"time": 7}, {"chunk_size": 3},
    {"kind": "whole"}, {"tags": [1]}, {"set_id": None},
])
def test_a_description_is_checked_like_a_manifest(sound: bytes, repository: Repository,
                                                  change: dict[str, object]) -> None:
    start = sound.index(b"B", 12 + 9 + 68)
    (length,) = struct.unpack_from("<Q", sound, start + 1)
    values = json.loads(sound[start + 9 : start + 9 + length])
    values["backup"].update(change)
    stream = sound[:start] + record(b"B", json.dumps(values).encode()) + extent(b"z", 0, 4096)
    with pytest.raises(DamagedError, match="does not describe its backup"):
        receive(repository, open_stream(io.BufferedReader(io.BytesIO(closed(stream)))))
    assert repository.backups() == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100000, b'{"backup": {}, "base": {}}',
                                     b'{"backup": 3, "base": null}'])
def test_a_description_that_is_none_is_refused(repository: Repository, content: bytes) -> None:
    stream = closed(HEAD + record(b"B", content))
    with pytest.raises(DamagedError, match=r"describe|say which device"):
        receive(repository, open_stream(io.BufferedReader(io.BytesIO(stream))))


@pytest.mark.parametrize("at", [0.3, 0.9, 0.999])
def test_a_stream_that_breaks_off_leaves_no_backup_and_no_lock(repository: Repository, sound: bytes, tmp_path: Path,
                                                               at: float) -> None:
    with pytest.raises(StasisError):
        receive(repository, open_stream(io.BufferedReader(io.BytesIO(sound[: int(len(sound) * at)]))))
    assert repository.backups() == []
    assert repository.locks() == []
