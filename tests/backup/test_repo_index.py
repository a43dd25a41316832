# SPDX-License-Identifier: Apache-2.0
"""Indexes: a later one is what a dictionary of names would be, and shares all segments in which nothing changed."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.backup.repo import index as index_
from stasis.backup.repo.delta import with_bit, without_bit
from stasis.backup.repo.index import NAMES_PER_SEGMENT, ZERO, Index, IndexBuilder, is_whole

CHUNK = 65536


class Segments:
    """Where segments are kept, and how often one was read."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.loads = 0

    def save(self, names: bytes) -> bytes:
        name = hashlib.sha256(names).digest()
        self.kept[name] = names
        return name

    def load(self, name: bytes, length: int) -> bytes:
        self.loads += 1
        assert is_whole(self.kept[name], length)
        return self.kept[name]

    def index(self, size: int, names: tuple[bytes, ...]) -> Index:
        return Index(size, CHUNK, names, self.load)

    def builder(self, size: int | None, parent: Index | None = None) -> IndexBuilder:
        return IndexBuilder(size, CHUNK, parent, self.save)


def chunk_name(number: int) -> bytes:
    return without_bit(hashlib.sha256(b"%d" % number).digest())


def delta_name(number: int) -> bytes:
    return with_bit(hashlib.sha256(b"delta %d" % number).digest())


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_, "NAMES_PER_SEGMENT", 8)


changes = st.dictionaries(st.integers(0, 39), st.integers(-5, 5))  # a negative number stands for a delta


@given(st.lists(changes, max_size=4), st.integers(1, 40))
def test_a_history_of_indexes_is_a_history_of_dictionaries(history: list[dict[int, int]], count: int) -> None:
    segments, parent, model = Segments(), None, dict.fromkeys(range(count), ZERO)
    chains: dict[int, tuple[bytes, ...]] = {}
    for change in history:
        builder = segments.builder(count * CHUNK, parent)
        for number, value in sorted(change.items()):
            if number < count:
                chains.pop(number, None)
                model[number] = ZERO if value == 0 else chunk_name(value) if value > 0 else delta_name(value)
                if value < 0:
                    chains[number] = (*(delta_name(-one) for one in range(100, 100 - value)), chunk_name(100 + number))
                builder.set(number, model[number], chains.get(number, ()))
                builder.settled(number)
        parent = segments.index(count * CHUNK, builder.finish())
        assert list(parent.names()) == [model[number] for number in range(count)]
        assert [parent.name(number) for number in range(count)] == list(model.values())
        assert list(parent.names(3, 7)) == list(model.values())[3:10]
        found = {8 * n + place: chain for n in range(-(-count // 8)) for place, chain in parent.chains(n).items()}
        assert found == chains
        below = {name for chain in chains.values() for name in chain}
        assert set(parent.needed()) | {ZERO} == {*model.values(), *below, ZERO}


@pytest.mark.parametrize(("name", "chain"), [
    (delta_name(1), ()), (delta_name(1), (delta_name(2),)), (chunk_name(1), (chunk_name(2),)),
    (delta_name(1), (chunk_name(2), chunk_name(3))), (chunk_name(1), (delta_name(2), chunk_name(3))),
])
def test_a_chain_belongs_to_a_delta_and_ends_with_what_is_none(name: bytes, chain: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match="chain"):
        Segments().builder(CHUNK).set(0, name, chain)


@pytest.mark.parametrize("cut", [-32, -1, 1, 32])
def test_a_segment_of_another_length_is_not_whole(cut: int) -> None:
    content = chunk_name(1) + delta_name(2) + chunk_name(3)
    assert is_whole(content, 64)
    assert not is_whole(content[:cut] if cut < 0 else content + bytes(cut), 64)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_device_that_changed_its_size_keeps_what_both_have(old: int, new: int, data: Any) -> None:
    segments = Segments()
    before = segments.builder(old * CHUNK)
    for number in range(old):
        before.set(number, chunk_name(number))
    parent = segments.index(old * CHUNK, before.finish())
    after = segments.builder(new * CHUNK, parent)
    changed = data.draw(st.sets(st.integers(0, new - 1)))
    for number in changed:
        after.set(number, chunk_name(1000))
    found = list(segments.index(new * CHUNK, after.finish()).names())
    assert found == [chunk_name(1000) if n in changed else chunk_name(n) if n < old else ZERO for n in range(new)]


def test_what_did_not_change_is_shared() -> None:
    segments = Segments()
    builder = segments.builder(40 * CHUNK)
    for number in range(40):
        builder.set(number, chunk_name(number))
    parent = segments.index(40 * CHUNK, builder.finish())
    kept = len(segments.kept)
    builder = segments.builder(40 * CHUNK, parent)
    builder.set(17, chunk_name(99))
    names = builder.finish()
    assert len(segments.kept) == kept + 1
    assert [a == b for a, b in zip(names, parent.segment_names(), strict=True)] == [True, True, False, True, True]


def test_an_empty_device_of_any_size_costs_nothing() -> None:
    segments = Segments()
    index = segments.index(40 * CHUNK, segments.builder(40 * CHUNK).finish())
    assert (set(index.segment_names()), segments.kept) == ({ZERO}, {})
    assert set(index.names()) == {ZERO}
    assert segments.builder(0).finish() == ()


def test_a_segment_is_read_once_and_few_are_kept() -> None:
    segments = Segments()
    builder = segments.builder(4000 * CHUNK)
    for number in range(4000):
        builder.set(number, chunk_name(number))
        builder.settled(number)
    index = segments.index(4000 * CHUNK, builder.finish())
    assert sum(1 for _ in index.names()) == 4000
    assert (segments.loads, len(index._cache)) == (500, index_.CACHED_SEGMENTS)


def test_what_is_settled_is_written_and_takes_no_memory() -> None:
    segments = Segments()
    builder = segments.builder(40 * CHUNK)
    for number in range(20):
        builder.set(number, chunk_name(number))
    builder.settled(17)
    assert (len(segments.kept), list(builder._open)) == (2, [2])
    with pytest.raises(ValueError, match="settled"):
        builder.set(15, chunk_name(1))
    with pytest.raises(IndexError):
        builder.set(40, chunk_name(1))


@pytest.mark.parametrize(("old", "new"), [*itertools.permutations([2.5, 3, 3.25, 5], 2)])
def test_a_short_chunk_is_never_taken_over_at_another_length(old: float, new: float) -> None:
    segments = Segments()
    before = segments.builder(int(old * CHUNK))
    for number in range(before.count):
        before.set(number, chunk_name(number))
    parent = segments.index(int(old * CHUNK), before.finish())
    last = min(parent.count, segments.builder(int(new * CHUNK)).count) - 1
    fits = parent.chunk_length(last) == Index(int(new * CHUNK), CHUNK, (), segments.load).chunk_length(last)
    after = segments.builder(int(new * CHUNK), parent)
    if not fits:
        with pytest.raises(ValueError, match=f"chunk {last} has another length"):
            after.finish()
        after = segments.builder(int(new * CHUNK), parent)
        after.set(last, chunk_name(50))
    found = list(segments.index(int(new * CHUNK), after.finish()).names())
    assert found[last] == chunk_name(last if fits else 50)


def test_the_size_may_be_known_at_the_end_only() -> None:
    segments = Segments()
    builder = segments.builder(None)
    for number in range(11):
        builder.set(number, chunk_name(number))
        builder.settled(number)
    size = 10 * CHUNK + 5
    index = segments.index(size, builder.finish(size))
    assert list(index.names()) == [chunk_name(number) for number in range(11)]
    assert (index.count, index.chunk_length(10)) == (11, 5)


def test_segments_hold_4096_names() -> None:
    assert NAMES_PER_SEGMENT == 4096  # part of the format
