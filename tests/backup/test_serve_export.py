# SPDX-License-Identifier: Apache-2.0
"""A served backup reads as it was stored, whatever is asked for and however often it was asked before."""

from __future__ import annotations

import itertools
import threading
from errno import EIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.repo.index import NAMES_PER_SEGMENT
from stasis.backup.serve.cache import ChunkCache
from stasis.backup.serve.changes import Change, differences
from stasis.backup.serve.export import BackupExport
from stasis.backup.serve.readahead import ReadAhead
from stasis.errors import DamagedError
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.client import Client
from tests.backup.fakes import CHUNK, FakeIndex, FakeReader, FakeStore, image
from tests.nbd.wire import ThreadedServer

SIZE = 40 * CHUNK + 1000


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def cache_of(store: FakeStore, slots: int = 8, threads: int = 2) -> ChunkCache:
    return ChunkCache(lambda: FakeReader(store), CHUNK, limit=slots * CHUNK, threads=threads)


def read(export: BackupExport, *ranges: tuple[int, int]) -> list[bytes]:
    """What one batch of requests brings."""
    with IoBuffer(sum(length for _, length in ranges)) as buffer:
        requests, position = [], 0
        for offset, length in ranges:
            requests.append((offset, length, position))
            position += length
        export.read(buffer, requests)
        return [bytes(buffer.view[at : at + length]) for _, length, at in requests]


RANGES = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 6 * CHUNK)).map(lambda r: (r[0], min(r[1], SIZE - r[0]))),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40)
@given(batches=st.lists(RANGES, min_size=1, max_size=4), seed=st.integers(0, 3))
def test_any_batch_of_reads_equals_the_image(batches: list[list[tuple[int, int]]], seed: int) -> None:
    store = FakeStore()
    data = image(SIZE, seed)
    cache = cache_of(store)
    export = BackupExport("b", FakeIndex(store, data), cache)
    for ranges in batches:
        assert read(export, *ranges) == [data[offset : offset + length] for offset, length in ranges]
    cache.close()


def test_a_batch_of_more_chunks_than_there_are_slots_is_read(store: FakeStore) -> None:
    data = image(SIZE, 1)
    cache = cache_of(store, slots=4)
    export = BackupExport("b", FakeIndex(store, data), cache)
    assert read(export, (0, SIZE)) == [data]
    cache.close()


def test_memory_is_bounded_while_many_chunks_are_read_and_fetched_ahead(store: FakeStore) -> None:
    cache = cache_of(store, slots=4)
    export = BackupExport("b", FakeIndex(store, image(SIZE, 1)), cache)
    for offset in range(0, SIZE - CHUNK, CHUNK // 2):
        read(export, (offset, CHUNK))
        export.cache(offset, SIZE - offset)
    assert len(cache._slots) + len(cache._free) <= 4
    assert cache._buffer.size <= max(4 * CHUNK, 4096)
    cache.close()


def test_a_chunk_is_fetched_once_for_all_who_read_it(store: FakeStore) -> None:
    data = image(4 * CHUNK, 2)
    cache = cache_of(store)
    exports = [BackupExport(name, FakeIndex(store, data), cache) for name in "ab"]
    for export in exports * 3:
        assert read(export, (5, 100)) == [data[5:105]]
    assert len(store.fetched) == 1
    cache.close()


def test_zero_chunks_are_never_fetched(store: FakeStore) -> None:
    cache = cache_of(store)
    export = BackupExport("b", FakeIndex(store, bytes(SIZE)), cache)
    assert read(export, (3, SIZE - 3)) == [bytes(SIZE - 3)]
    assert not store.fetched
    cache.close()


def test_a_sequential_reader_finds_its_next_chunks_fetched(store: FakeStore) -> None:
    data = image(SIZE, 3, zeroes=False)
    cache = cache_of(store, slots=16)
    export = BackupExport("b", FakeIndex(store, data), cache)
    for number in range(3):
        read(export, (number * CHUNK, CHUNK))
    ahead = FakeIndex(store, data).name(4)
    assert store.fetched.wait_for(ahead)
    cache.close()


def test_several_sequential_readers_are_told_apart() -> None:
    ahead = ReadAhead(8)
    for first in (0, 100, 200):
        assert not ahead.touch(first)
    assert [list(ahead.touch(first + 1)) for first in (0, 100, 200)] == [[2], [102], [202]]
    assert [list(ahead.touch(first + 2)) for first in (0, 100, 200)] == [[3, 4], [103, 104], [203, 204]]
    assert not ahead.touch(102)  # the rest of a chunk that was read in part
    assert list(ahead.touch(103)) == [104, 105, 106, 107]
    assert not ahead.touch(57)


@pytest.mark.expects_errors("altered")
def test_a_damaged_chunk_fails_only_the_reads_that_touch_it(store: FakeStore, short_dir: Path) -> None:
    data = image(SIZE, 4, zeroes=False)
    index = FakeIndex(store, data)
    store.damage(index.name(7))
    cache = cache_of(store)
    export = BackupExport("disk", index, cache)
    with ThreadedServer(short_dir / "s", [export]) as server, Client.connect(server.uri()) as client:
        good = [(number * CHUNK, memoryview(bytearray(100))) for number in range(20)]
        with pytest.raises(OSError) as caught:
            client.read_many(good)
        assert caught.value.errno == EIO
        for offset, view in good:
            assert (bytes(view) == data[offset : offset + 100]) is (offset != 7 * CHUNK)
        store.repair()
        assert client.pread(7 * CHUNK, 10) == data[7 * CHUNK : 7 * CHUNK + 10]
    cache.close()


def test_a_damaged_chunk_is_logged_by_name_and_only_once(
    store: FakeStore, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    request.applymarker(pytest.mark.expects_errors("altered"))
    index = FakeIndex(store, image(SIZE, 4, zeroes=False))
    store.damage(index.name(7))
    cache = cache_of(store)
    export = BackupExport("b", index, cache)
    for _ in range(3):
        with pytest.raises(OSError):
            read(export, (7 * CHUNK, 1))
    assert [record.getMessage() for record in caplog.records] == [
        f"backup b: chunk {index.name(7).hex()} is altered"
    ]
    cache.close()


def test_a_damaged_index_fails_reads_and_status_and_nothing_else(
    store: FakeStore, request: pytest.FixtureRequest
) -> None:
    request.applymarker(pytest.mark.expects_errors("segment"))

    class Damaged(FakeIndex):
        def name(self, number: int) -> bytes:
            raise DamagedError("segment 0 is altered")

        def names(self, first: int, count: int):  # type: ignore[no-untyped-def]
            raise DamagedError("segment 0 is altered")

    cache = cache_of(store)
    export = BackupExport("b", Damaged(store, image(SIZE, 1)), cache)
    for call in (lambda: read(export, (0, 1)), lambda: export.block_status("base:allocation", 0, SIZE)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == EIO
    cache.close()


def test_a_wait_for_a_store_that_hangs_ends_with_the_server(store: FakeStore) -> None:
    cache = cache_of(store)
    export = BackupExport("b", FakeIndex(store, image(SIZE, 1, zeroes=False)), cache)
    store.hang.set()
    failures: list[int | None] = []

    def reader() -> None:
        try:
            read(export, (0, 1))
        except OSError as error:
            failures.append(error.errno)

    thread = threading.Thread(target=reader)
    thread.start()
    assert store.asked.wait(30)
    cache.abort()
    thread.join()
    store.hang.clear()
    cache.close()
    assert failures == [EIO]


class TestStatus:
    @settings(max_examples=30)
    @given(seed=st.integers(0, 20), where=st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)))
    def test_allocation_says_zero_exactly_where_chunks_are(self, seed: int, where: tuple[int, int]) -> None:
        store, data = FakeStore(), image(SIZE, seed)
        cache = cache_of(store)
        export = BackupExport("b", FakeIndex(store, data), cache)
        offset, length = where[0], min(where[1], SIZE - where[0])
        extents = export.block_status("base:allocation", offset, length)
        assert sum(count for count, _ in extents) == length
        assert all(a[1] != b[1] for a, b in itertools.pairwise(extents))
        for count, flags in extents:
            last = offset + count
            for number in range(offset // CHUNK, -(-last // CHUNK)):
                assert (not any(data[number * CHUNK : (number + 1) * CHUNK])) is bool(flags)
            offset = last
        cache.close()

    def test_equal_segments_are_not_looked_at(self, store: FakeStore) -> None:
        class Blind(FakeIndex):
            def names(self, first: int, count: int):  # type: ignore[no-untyped-def]
                assert first == NAMES_PER_SEGMENT, "a segment that is equal was read"
                return super().names(first, count)

        names = [bytes([1]) * 32] * (2 * NAMES_PER_SEGMENT)
        base, target = Blind(store, names=names), Blind(store, names=[*names[:-1], bytes(32)])
        last = 2 * NAMES_PER_SEGMENT - 1
        assert list(differences(base, target, 0, last + 1)) == [
            (0, NAMES_PER_SEGMENT, Change.NONE),
            (NAMES_PER_SEGMENT, NAMES_PER_SEGMENT - 1, Change.NONE),
            (last, 1, Change.ZERO),
        ]

    def test_bitmap_is_the_only_one_and_tells_the_changes(self, store: FakeStore, short_dir: Path) -> None:
        before = image(SIZE, 1, zeroes=False)
        now = bytearray(before)
        now[3 * CHUNK] ^= 1
        now[8 * CHUNK : 10 * CHUNK] = bytes(2 * CHUNK)
        cache = cache_of(store)
        base = FakeIndex(store, before)
        export = BackupExport("disk", FakeIndex(store, bytes(now)), cache, against=("older", base))
        assert export.contexts() == ("base:allocation", "qemu:dirty-bitmap:older")
        context = "qemu:dirty-bitmap:older"
        with (
            ThreadedServer(short_dir / "s", [export]) as server,
            Client.connect(server.uri(), contexts=[context]) as client,
        ):
            dirty = [(offset, length) for offset, length, flags in client.extents(context) if flags]
        assert dirty == [(3 * CHUNK, CHUNK), (8 * CHUNK, 2 * CHUNK)]
        cache.close()

    def test_no_bitmap_without_another_backup(self, store: FakeStore) -> None:
        cache = cache_of(store)
        assert BackupExport("b", FakeIndex(store, bytes(10)), cache).contexts() == ("base:allocation",)
        cache.close()
