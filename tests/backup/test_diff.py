# SPDX-License-Identifier: Apache-2.0
"""What differs between two backups: every byte that does is told, in order, from any offset on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.backup.serve.cache import ChunkCache
from stasis.backup.serve.diff import EXACT_BLOCK, Difference, diff
from stasis.errors import DamagedError, UsageError
from tests.backup.fakes import CHUNK, FakeIndex, FakeReader, FakeStore, image

SIZES = st.integers(1, 12 * CHUNK) | st.integers(1, 12).map(lambda count: count * CHUNK)
Patch = tuple[int, int, bool]
PATCHES = st.lists(st.tuples(st.integers(0, 12 * CHUNK), st.integers(1, 3 * CHUNK), st.booleans()), max_size=5)


def patched(base: bytes, size: int, patches: list[Patch]) -> bytes:
    """The base at another size, with random bytes or zeroes put in some places."""
    data = bytearray(base[:size].ljust(size, b"\0"))
    for number, (offset, length, zero) in enumerate(patches):
        end = min(offset + length, size)
        if offset < end:
            data[offset:end] = bytes(end - offset) if zero else image(end - offset, number, zeroes=False)
    return bytes(data)


def applied(base: bytes, target: bytes, extents: list[Difference]) -> bytes:
    """The base, made the target's size with garbage, after the extents were copied."""
    data = bytearray(base[: len(target)].ljust(len(target), b"\xaa"))
    for offset, length, zero in extents:
        data[offset : offset + length] = bytes(length) if zero else target[offset : offset + length]
    return bytes(data)


def check_order(extents: list[Difference], size: int) -> None:
    for before, behind in itertools.pairwise(extents):
        end = before.offset + before.length
        assert end < behind.offset or (end == behind.offset and before.zero is not behind.zero)
    assert all(extent.length > 0 and 0 <= extent.offset <= size - extent.length for extent in extents)


@settings(max_examples=150)
@given(old=SIZES, new=SIZES, patches=PATCHES, exact=st.booleans())
def test_copying_the_extents_makes_the_one_the_other(old: int, new: int, patches: list[Patch], exact: bool) -> None:
    store = FakeStore()
    base = image(old, 1)
    target = patched(base, new, patches)
    cache = ChunkCache(lambda: FakeReader(store), CHUNK, limit=8 * CHUNK)
    extents = list(diff(FakeIndex(store, base), FakeIndex(store, target), contents=cache if exact else None))
    check_order(extents, new)
    assert applied(base, target, extents) == target
    if exact:
        assert all(differs(base, target, extent) for extent in extents)
    cache.close()


def differs(base: bytes, target: bytes, extent: Difference) -> bool:
    """Whether every block of the extent differs, and is zero or not as told."""
    for offset in range(extent.offset, extent.offset + extent.length, EXACT_BLOCK):
        block = target[offset : min(offset + EXACT_BLOCK, extent.offset + extent.length)]
        if base[offset : offset + len(block)] == block or any(block) is extent.zero:
            return False
    return True


@settings(max_examples=60)
@given(patches=PATCHES, offset=st.integers(0, 10 * CHUNK), limit=st.integers(1, 3), exact=st.booleans())
def test_pages_from_any_offset_add_up_to_the_rest(patches: list[Patch], offset: int, limit: int, exact: bool) -> None:
    store = FakeStore()
    base = image(10 * CHUNK, 2)
    indexes = FakeIndex(store, base), FakeIndex(store, patched(base, 10 * CHUNK, patches))
    cache = ChunkCache(lambda: FakeReader(store), CHUNK, limit=8 * CHUNK)
    contents = cache if exact else None
    pages: list[Difference] = []
    position = offset
    while page := list(diff(*indexes, offset=position, limit=limit, contents=contents)):
        assert len(page) <= limit
        pages += page
        position = page[-1].offset + page[-1].length
    assert pages == list(diff(*indexes, offset=offset, contents=contents))
    cache.close()


def test_nothing_differs_from_itself_and_nothing_is_read() -> None:
    class Unread(FakeIndex):
        def names(self, first: int, count: int) -> Iterator[bytes]:
            raise AssertionError("an equal segment was read")

    store, data = FakeStore(), image(12 * CHUNK, 3)
    assert list(diff(Unread(store, data), Unread(store, data))) == []


def test_zeroes_that_lie_behind_the_end_of_the_base_are_told() -> None:
    store = FakeStore()
    base, target = FakeIndex(store, bytes(CHUNK // 2)), FakeIndex(store, bytes(3 * CHUNK))
    assert list(diff(base, target)) == [(0, 3 * CHUNK, True)]
    assert list(diff(target, base)) == []


def test_it_is_a_stream() -> None:
    names = [bytes([1]) * 32] * 100_000
    other = [bytes([number % 2 + 1]) * 32 for number in range(100_000)]
    found = diff(FakeIndex(FakeStore(), names=names), FakeIndex(FakeStore(), names=other))
    assert next(found) == (CHUNK, CHUNK, False)
    assert next(found) == (3 * CHUNK, CHUNK, False)


def test_damaged_chunk_ends_an_exact_comparison_with_its_name() -> None:
    store = FakeStore()
    base, target = FakeIndex(store, image(CHUNK, 1, zeroes=False)), FakeIndex(store, image(CHUNK, 2, zeroes=False))
    store.damage(target.name(0))
    cache = ChunkCache(lambda: FakeReader(store), CHUNK)
    with pytest.raises(DamagedError, match=target.name(0).hex()):
        list(diff(base, target, contents=cache))
    cache.close()


@pytest.mark.parametrize("offset", [-1, CHUNK + 1])
def test_offset_outside_is_refused(offset: int) -> None:
    index = FakeIndex(FakeStore(), bytes(CHUNK))
    with pytest.raises(UsageError, match="not within"):
        diff(index, index, offset=offset)


def test_offset_at_the_end_finds_nothing() -> None:
    store = FakeStore()
    assert list(diff(FakeIndex(store, bytes(CHUNK)), FakeIndex(store, image(CHUNK, 1)), offset=CHUNK)) == []
