# SPDX-License-Identifier: Apache-2.0
"""Sizes read and print the same everywhere, and nonsense is refused with a hint."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.errors import ExitCode, UsageError
from stasis.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64KB", 65536),
        ("10 G", 10 << 30),
        (" 2TiB\n", 2 << 40),
        ("1.5K", 1536),
        ("0.5M", 524288),
        ("8388607T", 8388607 << 40),
    ],
)
def test_size_text_is_read_in_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "K", "-1", "64X", "1e3", "0x10", "1.", ".5", "1 2", "64K64", "٣", "0.3", "1.0001K", "9" * 5000],
)
def test_other_text_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint


def test_a_size_that_no_device_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="larger than any device"):
        parse_size("8388608T")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (512, "512 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 50, "5120 TiB"),
        (-4096, "-4 KiB"),
    ],
)
def test_sizes_print_in_binary_units(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_a_printed_size_reads_back_to_within_its_last_digit(size: int) -> None:
    text = format_size(size).replace(" bytes", "").replace(" byte", "")
    number, _, unit = text.partition(" ")
    step = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    if "." in number:
        assert abs(float(number) * step - size) <= 0.051 * step
    else:
        assert parse_size(text) == size
