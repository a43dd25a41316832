# SPDX-License-Identifier: Apache-2.0
"""Where a COW file on its own device lies, and what is refused: the map against a plain model, byte by byte."""

from __future__ import annotations

import os
from errno import EINVAL, EOPNOTSUPP

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.block.origin import Request
from stasis.datto.claim import Claim
from stasis.datto.extents import BlockMap, Territory, check_extents, probes
from stasis.errors import StasisError, StateError, UnsupportedError
from stasis.linux import fiemap
from stasis.linux.fiemap import FileExtent

UNIT = 512
DEVICE = 400 * UNIT
EXAMPLES = 2000 if os.environ.get("STASIS_LONG") else 60


@st.composite
def layouts(draw: st.DrawFn) -> list[FileExtent]:
    """A file that is laid out as file systems do: stretches anywhere on the device, none twice, no gap in the file."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    gaps = draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    order = draw(st.permutations(range(len(lengths))))
    places, place = {}, 1
    for number in order:
        places[number] = place + gaps[number]
        place = places[number] + lengths[number]
    extents, logical = [], 0
    for number, length in enumerate(lengths):
        extents.append(FileExtent(logical * UNIT, places[number] * UNIT, length * UNIT, 0))
        logical += length
    return extents


def _model(extents: list[FileExtent]) -> list[int]:
    """The unit of the device that each unit of the file lies in."""
    return [(extent.physical + at) // UNIT for extent in extents for at in range(0, extent.length, UNIT)]


@settings(max_examples=EXAMPLES)
@given(layouts(), st.data())
def test_every_byte_lies_where_the_file_system_said(extents: list[FileExtent], data: st.DataObject) -> None:
    model = _model(extents)
    size = len(model) * UNIT
    blocks = check_extents(data.draw(st.permutations(extents)), size, DEVICE, "cow")
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    if (place := blocks.place(offset, length)) >= 0:
        assert list(blocks.pieces(offset, length)) == [(place, 0, length)]
    at = offset
    for physical, position, count in blocks.pieces(offset, length):
        assert position == at - offset
        assert [physical + step for step in range(count)] == [
            model[(at + step) // UNIT] * UNIT + (at + step) % UNIT for step in range(count)]
        at += count
    assert at == offset + length
    with pytest.raises(OSError, match="no place"):
        list(blocks.pieces(offset, size - offset + 1))


@settings(max_examples=EXAMPLES)
@given(layouts(), st.integers(1, 100))
def test_a_map_that_is_cut_keeps_what_lies_before(extents: list[FileExtent], units: int) -> None:
    model = _model(extents)[:units]
    blocks = check_extents(extents, 1, DEVICE, "cow").cut(units * UNIT)
    assert blocks.length == len(model) * UNIT
    assert [unit for unit in range(DEVICE // UNIT) if any(start <= unit * UNIT < end for start, end in blocks.ranges())
            ] == sorted(model)


@settings(max_examples=EXAMPLES)
@given(layouts(), st.integers(0, DEVICE), st.integers(0, 5000))
def test_a_territory_knows_its_own_bytes(extents: list[FileExtent], start: int, length: int) -> None:
    own = {byte for unit in _model(extents) for byte in range(unit * UNIT, (unit + 1) * UNIT)}
    territory = Territory(check_extents(extents, 1, DEVICE, "cow").ranges(), 4096)
    end = start + length
    asked = set(range(start, end))
    inside, outside = list(territory.inside(start, end)), list(territory.outside(start, end))
    assert {byte for low, high in inside for byte in range(low, high)} == asked & own
    assert {byte for low, high in outside for byte in range(low, high)} == asked - own
    assert sum(high - low for low, high in inside + outside) == length
    assert territory.touches(start, end) == bool(asked & own)
    assert territory.is_rough == any((low | high) % 4096 for low, high in territory.ranges)


@settings(max_examples=EXAMPLES)
@given(layouts(), st.integers(0, UNIT - 1))
def test_both_ends_of_every_stretch_are_tried(extents: list[FileExtent], short: int) -> None:
    size = len(_model(extents)) * UNIT - short
    blocks = check_extents(extents, size, DEVICE, "cow")
    tried = {byte for offset, length in probes(blocks, size) for byte in range(offset, offset + length)}
    assert all(offset + length <= size for offset, length in probes(blocks, size))
    for logical, _, count in blocks.stretches:
        assert logical in tried
        assert min(logical + count, size) - 1 in tried


def _refused(extents: list[FileExtent], size: int = 16 * UNIT) -> StasisError:
    with pytest.raises(StasisError) as caught:
        check_extents(extents, size, DEVICE, "/mnt/cow")
    assert "/mnt/cow" in caught.value.message
    return caught.value


@pytest.mark.parametrize(("flag", "says"), [
    (fiemap.FIEMAP_EXTENT_UNKNOWN, "not known"),
    (fiemap.FIEMAP_EXTENT_DELALLOC, "no place yet"),
    (fiemap.FIEMAP_EXTENT_ENCODED, "compressed"),
    (fiemap.FIEMAP_EXTENT_DATA_ENCRYPTED, "encrypted"),
    (fiemap.FIEMAP_EXTENT_NOT_ALIGNED, "does not begin"),
    (fiemap.FIEMAP_EXTENT_DATA_INLINE, "inside the file system"),
    (fiemap.FIEMAP_EXTENT_DATA_TAIL, "shares a block"),
    (fiemap.FIEMAP_EXTENT_UNWRITTEN, "never written"),
    (fiemap.FIEMAP_EXTENT_SHARED, "shares blocks"),
    (0x4000, "new kind"),
])
def test_each_kind_of_extent_that_must_not_be_written_is_refused(flag: int, says: str) -> None:
    good = FileExtent(0, 8 * UNIT, 8 * UNIT, 0)
    bad = FileExtent(8 * UNIT, 32 * UNIT, 8 * UNIT, flag | fiemap.FIEMAP_EXTENT_LAST)
    error = _refused([good, bad])
    assert isinstance(error, UnsupportedError)
    assert (error.errno, says in error.message) == (EOPNOTSUPP, True)


def test_unwritten_extents_pass_only_before_the_file_is_filled() -> None:
    extent = FileExtent(0, 8 * UNIT, 16 * UNIT, fiemap.FIEMAP_EXTENT_UNWRITTEN)
    blocks = check_extents([extent], 16 * UNIT, DEVICE, "cow", allowed=extent.flags)
    assert blocks.stretches == ((0, 8 * UNIT, 16 * UNIT),)
    _refused([extent])


@pytest.mark.parametrize("extents", [
    [],
    [FileExtent(0, 8 * UNIT, 15 * UNIT, 0)],
    [FileExtent(UNIT, 8 * UNIT, 16 * UNIT, 0)],
    [FileExtent(0, 8 * UNIT, 8 * UNIT, 0), FileExtent(9 * UNIT, 40 * UNIT, 8 * UNIT, 0)],
    [FileExtent(0, 8 * UNIT, 8 * UNIT, 0), FileExtent(7 * UNIT, 40 * UNIT, 9 * UNIT, 0)],
    [FileExtent(0, 8 * UNIT, 8 * UNIT, 0), FileExtent(8 * UNIT, 12 * UNIT, 8 * UNIT, 0)],
    [FileExtent(0, 0, 16 * UNIT, 0)],
    [FileExtent(0, DEVICE - 15 * UNIT, 16 * UNIT, 0)],
    [FileExtent(0, 8 * UNIT + 1, 16 * UNIT, 0)],
], ids=["nothing", "short", "late", "hole", "overlap in the file", "block twice", "block 0", "behind the end", "odd"])
def test_holes_overlaps_and_places_outside_the_device_are_refused(extents: list[FileExtent]) -> None:
    error = _refused(extents)
    assert isinstance(error, StateError)
    assert error.errno == EINVAL


# -- claims ---------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), max_size=6))
def test_while_a_claim_is_filled_a_tracer_hears_of_everything_else(ranges: list[tuple[int, int]]) -> None:
    claim = Claim(Territory([(50, 100), (150, 200)], 4096))
    requests: list[Request] = [(offset, length, 0) for offset, length in ranges]
    told = {byte for offset, length, _ in claim.see(requests) for byte in range(offset, offset + length)}
    asked = {byte for offset, length, _ in requests for byte in range(offset, offset + length)}
    assert told == {byte for byte in asked if not (50 <= byte < 100 or 150 <= byte < 200)}
    claim.require("cow")


def test_a_claim_that_is_filled_is_broken_by_any_write_to_it() -> None:
    claim = Claim(Territory([(4096, 8192)], 4096))
    claim.is_filling = False
    claim.see([(0, 4096, 0), (8192, 4096, 0)])
    claim.require("cow")
    assert claim.see([(0, 4097, 0)]) == [(0, 4097, 0)]
    with pytest.raises(StateError):
        claim.require("cow")


def test_a_territory_in_numbers_never_leaves_anything_out() -> None:
    territory = Territory([(10, 20), (40, 50), (60, 70)], 4096)
    assert territory.as_numbers(6) == [10, 10, 40, 10, 60, 10]
    assert territory.as_numbers(5) == [10, 60]
    assert Territory((), 4096).as_numbers(5) == []


def test_an_empty_map_has_no_length() -> None:
    assert BlockMap(()).length == 0
    assert BlockMap(()).ranges() == []
