# SPDX-License-Identifier: Apache-2.0
"""A backup that is sent as a stream and received elsewhere is the same backup."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.progress import Progress
from stasis.backup.repo import Manifest, Repository, Secret
from stasis.backup.streams.image import receive_image
from stasis.backup.streams.receive import ReceiveResult, open_stream, receive
from stasis.backup.streams.send import send
from stasis.errors import BusyError, DamagedError, NotFoundError, UsageError
from tests.backup.stored import CHUNK, backup_of, content_of


def sent(repository: Repository, backup: Manifest, base: Manifest | None = None) -> bytes:
    sink = io.BytesIO()
    result = send(repository, backup, base, sink)
    assert result.bytes_sent == len(sink.getvalue())
    return sink.getvalue()


def received(repository: Repository, stream: bytes) -> ReceiveResult:
    return receive(repository, open_stream(io.BufferedReader(io.BytesIO(stream))))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(str(tmp_path / "here"), secret=None, chunk_size=CHUNK) as repository:
        yield repository


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Repository]:
    """Keys, and another chunk size."""
    with Repository.init(str(tmp_path / "there"), secret=Secret(b"key"), chunk_size=4 * CHUNK) as repository:
        yield repository


def image(chunks: int, seed: int = 1, *, tail: int = 777) -> bytearray:
    """Data, with a hole in the middle and an end within a chunk."""
    data = bytearray(random.Random(seed).randbytes(chunks * CHUNK + tail))
    data[3 * CHUNK : 5 * CHUNK] = bytes(2 * CHUNK)
    return data


def test_a_chain_of_increments_arrives_with_everything_that_is_known_of_it(here: Repository, there: Repository) -> None:
    data = image(9)
    first = backup_of(here, bytes(data), generation="g", change_number=3, tags=("weekly",), path="/dev/vdb")
    data[CHUNK + 5 : CHUNK + 9] = b"four"
    data[7 * CHUNK : 8 * CHUNK] = bytes(CHUNK)
    second = backup_of(here, bytes(data), generation="g", change_number=4, kind="incremental", parent=first.id)
    one = received(there, sent(here, first))
    stream = sent(here, second, first)
    two = received(there, stream)
    assert len(stream) < 10000
    assert (one.kind, one.parent, two.kind, two.parent) == ("full", None, "incremental", one.id)
    copies = there.backups()
    assert [copy.id for copy in copies] == [one.id, two.id]
    assert content_of(there, copies[1]) == data
    for copy, original in zip(copies, [first, second], strict=True):
        for field in ("set_id", "host", "device", "path", "time", "generation", "change_number", "tags"):
            assert getattr(copy, field) == getattr(original, field)
        assert original.id in copy.note


def test_what_has_arrived_once_is_not_stored_again(here: Repository, there: Repository) -> None:
    stream = sent(here, backup_of(here, bytes(image(4))))
    first, second = received(there, stream), received(there, stream)
    assert (first.known, second.known, second.bytes_stored) == (False, True, 0)
    assert first.id == second.id
    assert len(there.backups()) == 1


def test_an_increment_that_is_here_needs_its_base_no_more(here: Repository, there: Repository) -> None:
    first, second = backup_of(here, bytes(image(4))), backup_of(here, bytes(image(4, seed=2)))
    base = received(there, sent(here, first))
    increment = received(there, sent(here, second, first))
    there.remove_backup(base.id)
    again = received(there, sent(here, second, first))
    assert (again.known, again.id) == (True, increment.id)


def test_an_increment_without_its_base_says_which_one_is_missing(here: Repository, there: Repository) -> None:
    first, second = backup_of(here, bytes(image(4))), backup_of(here, bytes(image(4, seed=2)))
    with pytest.raises(NotFoundError, match=f"builds on backup {first.id[:12]} of disk on host at {first.time}"):
        received(there, sent(here, second, first))
    assert there.backups() == []


def test_a_backup_of_another_device_is_no_base(here: Repository) -> None:
    first, other = backup_of(here, bytes(image(4))), backup_of(here, bytes(image(4)), device="other")
    with pytest.raises(UsageError, match="is of other on host, not of disk on host"):
        send(here, first, other, io.BytesIO())


@pytest.mark.parametrize("size", [0, 1, CHUNK, 4 * CHUNK, 4 * CHUNK + 1])
def test_devices_of_any_size_arrive(here: Repository, there: Repository, size: int) -> None:
    data = random.Random(size).randbytes(size)
    received(there, sent(here, backup_of(here, data)))
    assert content_of(there, there.backups()[0]) == data


EDITS = st.lists(st.tuples(st.integers(0, 12 * CHUNK), st.integers(1, 3 * CHUNK), st.booleans()), max_size=6)


@settings(max_examples=15)
@given(edits=EDITS, sizes=st.tuples(st.integers(0, 12 * CHUNK), st.integers(0, 12 * CHUNK)),
       units=st.sampled_from([(1, 1), (1, 4), (4, 1)]))
def test_any_change_arrives_byte_for_byte(edits: list[tuple[int, int, bool]], sizes: tuple[int, int],
                                          units: tuple[int, int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Devices that grow, shrink, are zeroed in part or get data, between repositories of any chunk size."""
    folder = tmp_path_factory.mktemp("streams")
    draw = random.Random(repr(edits))
    before = draw.randbytes(sizes[0])
    after = bytearray(before[: sizes[1]].ljust(sizes[1], b"\0"))
    for offset, length, zero in edits:
        length = max(0, min(length, sizes[1] - offset))
        after[offset : offset + length] = bytes(length) if zero else draw.randbytes(length)
    with (Repository.init(str(folder / "a"), secret=None, chunk_size=units[0] * CHUNK) as ours,
          Repository.init(str(folder / "b"), secret=None, chunk_size=units[1] * CHUNK) as theirs):
        first, second = backup_of(ours, before), backup_of(ours, bytes(after))
        received(theirs, sent(ours, first))
        received(theirs, sent(ours, second, first))
        assert [content_of(theirs, copy) for copy in theirs.backups()] == [before, bytes(after)]


def records(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Tag and content of each record, read as Ceph's document says."""
    unpacked = zstandard.ZstdDecompressor().decompressobj().decompress(stream)
    assert unpacked.startswith(b"rbd diff v2\n")
    position = 12
    while (tag := unpacked[position : position + 1]) != b"e":
        (length,) = struct.unpack_from("<Q", unpacked, position + 1)
        yield tag, unpacked[position + 9 : position + 9 + length]
        position += 9 + length
    assert position + 1 == len(unpacked)


def imported(stream: bytes, image: bytearray) -> None:
    """Apply a stream as `rbd import-diff` does: what has an unknown tag is skipped."""
    for tag, content in records(stream):
        if tag == b"s":
            size = struct.unpack("<Q", content)[0]
            image[:] = image[:size].ljust(size, b"\0")
        elif tag in (b"w", b"z"):
            offset, length = struct.unpack_from("<QQ", content)
            image[offset : offset + length] = content[16:] if tag == b"w" else bytes(length)


def test_rbd_can_import_our_streams(here: Repository) -> None:
    before, after = image(6), image(8, seed=2)
    after[CHUNK : 2 * CHUNK] = bytes(CHUNK)
    first, second = backup_of(here, bytes(before)), backup_of(here, bytes(after))
    disk = bytearray()
    imported(sent(here, first), disk)
    assert disk == before
    imported(sent(here, second, first), disk)
    assert disk == after


def test_the_records_are_those_of_the_format(here: Repository) -> None:
    """docs/formats/backup-stream.md, from fixed bytes."""
    data = b"x" * 10 + bytes(CHUNK)
    first = backup_of(here, bytes(len(data)))
    stream = sent(here, backup := backup_of(here, data), first)
    found = list(records(stream))
    assert [tag for tag, _ in found] == [b"f", b"t", b"s", b"B", b"w", b"D"]
    assert found[0][1] == b"\x40\0\0\0" + first.id.encode()
    assert found[1][1] == b"\x40\0\0\0" + backup.id.encode()
    assert found[2][1] == b"\x0a\0\x01\0\0\0\0\0"
    assert json.loads(found[3][1])["base"] == {
        "set_id": first.set_id, "host": "host", "device": "disk", "time": first.time}
    assert found[4][1] == bytes(8) + b"\0\x10\0\0\0\0\0\0" + b"x" * 10 + bytes(4086)
    unpacked = zstandard.ZstdDecompressor().decompressobj().decompress(stream)
    assert found[5][1] == blake3(unpacked[: -(1 + 9 + 32)]).digest()


def test_a_stream_may_be_unpacked_on_the_way(here: Repository, there: Repository) -> None:
    backup = backup_of(here, bytes(image(4)))
    received(there, zstandard.ZstdDecompressor().decompressobj().decompress(sent(here, backup)))
    assert content_of(there, there.backups()[0]) == image(4)


def test_progress_of_both_ends_at_the_size(here: Repository, there: Repository) -> None:
    data = image(6)
    data[-CHUNK:] = bytes(CHUNK)
    backup, sending, receiving = backup_of(here, bytes(data)), Progress(), Progress()
    send(here, backup, None, sink := io.BytesIO(), sending)
    receive(there, open_stream(io.BufferedReader(io.BytesIO(sink.getvalue()))), receiving)
    assert sending.status().bytes_done == receiving.status().bytes_done == len(data)


# ---- into a file


def test_a_whole_backup_becomes_a_sparse_file(here: Repository, tmp_path: Path) -> None:
    data = bytearray(image(4)) + bytes(100 * CHUNK)
    stream = sent(here, backup_of(here, bytes(data)))
    result = receive_image(open_stream(io.BufferedReader(io.BytesIO(stream))), tmp_path / "disk.img")
    assert (tmp_path / "disk.img").read_bytes() == data
    assert (tmp_path / "disk.img").stat().st_blocks * 512 < 6 * CHUNK
    assert result.size == len(data)


def test_a_file_is_never_half_made_nor_replaced(here: Repository, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    stream = sent(here, backup_of(here, bytes(image(4))))
    with pytest.raises(DamagedError):
        receive_image(open_stream(io.BufferedReader(io.BytesIO(stream[: len(stream) // 2]))), folder / "disk.img")
    assert list(folder.iterdir()) == []
    (folder / "disk.img").write_text("precious")
    with pytest.raises(BusyError):
        receive_image(open_stream(io.BufferedReader(io.BytesIO(stream))), folder / "disk.img")
    assert (folder / "disk.img").read_text() == "precious"


def test_an_increment_is_no_file(here: Repository, tmp_path: Path) -> None:
    first, second = backup_of(here, bytes(image(4))), backup_of(here, bytes(image(4, seed=2)))
    stream = sent(here, second, first)
    with pytest.raises(UsageError, match="only what changed since"):
        receive_image(open_stream(io.BufferedReader(io.BytesIO(stream))), tmp_path / "disk.img")
