# SPDX-License-Identifier: Apache-2.0
"""Module parameters mean here what they mean to the module, and what it corrects in silence is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.blksnap import parameters
from stasis.blksnap.parameters import DEFAULTS, UNUSED, correct, load, parse
from stasis.block.settings import Settings
from stasis.errors import ExitCode, NotFoundError, UsageError
from tests.runner import Stasis


def test_the_defaults_need_no_correction() -> None:
    assert correct({}).corrections == []
    assert correct({}).as_settings() == {}
    assert correct(DEFAULTS).as_settings()["diff_storage_minimum"] == 1 << 30


@pytest.mark.parametrize(
    "text",
    ["chunk_minimum_shift=17\ndiff_storage_minimum = 0x400",
     "options blksnap chunk_minimum_shift=17 diff_storage_minimum=1024",
     "# a\noptions loop max_loop=8\noptions veeamblksnap chunk_minimum_shift=021 diff_storage_minimum=1024 # sectors\n",
     "chunk_minimum_shift=3\nchunk_minimum_shift=17\n\ndiff_storage_minimum=1024"],
)  # fmt: skip
def test_ways_to_write_them_down(text: str) -> None:
    assert parse(text) == {"chunk_minimum_shift": 17, "diff_storage_minimum": 1024}


@pytest.mark.parametrize(
    ("text", "said"),
    [("chunk_minimum_shift", "no setting"), ("\nchunk_size=4", "line 2 of .* no parameter chunk_size"),
     ("chunk_minimum_shift=-1", "'-1'"), ("chunk_minimum_shift=4294967296", "4294967296"),
     ("chunk_minimum_shift=many", "'many'")],
)  # fmt: skip
def test_what_is_no_parameter_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("given_values", "used"),
    [
        ({"tracking_block_minimum_shift": 30}, {"tracking_block_maximum_shift": 30}),
        ({"chunk_minimum_shift": 27}, {"chunk_minimum_shift": 26}),
        ({"chunk_minimum_shift": 9}, {"chunk_minimum_shift": 12}),
        ({"diff_storage_minimum": 0}, {"diff_storage_minimum": 1024}),
        ({"diff_storage_minimum": 2000}, {"diff_storage_minimum": 1536}),
        ({"chunk_maximum_count_shift": 63}, {"chunk_maximum_count_shift": 40}),
        ({"chunk_minimum_shift": 26, "diff_storage_minimum": 5}, {"diff_storage_minimum": 262144}),
    ],
)
def test_corrections_are_those_of_the_module(given_values: dict[str, int], used: dict[str, int]) -> None:
    found = correct(given_values)
    assert {one.name: one.used for one in found.corrections} == used
    assert all(found.values[one.name] == one.used for one in found.corrections)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), st.integers(0, 40)))
def test_corrected_parameters_are_consistent_and_stay(values: dict[str, int]) -> None:
    once = correct(values)
    assert correct(once.values).corrections == []
    chunk = (1 << once.values["chunk_minimum_shift"]) // parameters.SECTOR
    assert once.values["diff_storage_minimum"] % chunk == 0
    assert once.values["diff_storage_minimum"] >= 2 * chunk
    assert once.values["tracking_block_minimum_shift"] <= once.values["tracking_block_maximum_shift"]
    assert parse("\n".join(f"{name}={value}" for name, value in values.items())) == values
    assert set(once.as_settings()) <= set(Settings().as_dict())


def test_what_stasis_does_not_have_is_told() -> None:
    found = correct({"chunk_maximum_in_queue": 16, "chunk_maximum_count": 1000})
    assert found.unused == {"chunk_maximum_in_queue": UNUSED["chunk_maximum_in_queue"]}
    assert found.as_settings() == {"chunk_maximum_count_shift": 9}


def test_a_loaded_modules_own_parameters(tmp_path: Path) -> None:
    for name, value in DEFAULTS.items():
        (tmp_path / name).write_text(f"{value}\n")
    assert load(tmp_path) == DEFAULTS
    with pytest.raises(NotFoundError):
        load(tmp_path / "none")


def test_the_command_takes_them_over(stasis: Stasis, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("options blksnap chunk_minimum_shift=9 diff_storage_minimum=32769 chunk_maximum_in_cache=1\n")
    said = stasis("settings", "load", file)
    assert "corrected: chunk_minimum_shift=9 is taken as 12: a chunk is a page at least" in said
    assert "not used: chunk_maximum_in_cache" in said
    shown = stasis.json("settings", "show")
    assert (shown["chunk_minimum_shift"], shown["diff_storage_minimum"]) == (12, 32768 * 512)
    file.write_text("tracking_block_minimum_shift=11\n")
    assert "out of range" in stasis.fail(ExitCode.USAGE, "settings", "load", file)
    assert stasis.json("settings", "show") == shown
