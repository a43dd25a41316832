# SPDX-License-Identifier: Apache-2.0
"""blksnap's command line is read as Boost reads it, and numbers as C++ reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.blksnap.console import numbers
from stasis.blksnap.console.commands import ALIASES, COMMANDS, REPLACED, command
from stasis.blksnap.console.grammar import FLAG, MANY, ONE, Option, parse
from stasis.errors import UsageError

CASES = json.loads((Path(__file__).parent / "boost.json").read_text())
KINDS = {"flag": FLAG, "one": ONE, "multi": MANY}


def _options(text: str) -> list[Option]:
    found = []
    for word in text.split():
        names, kind = word.split(":")
        name, short = names.split(",")
        found.append(Option(name, short, KINDS[kind], ""))
    return found


def _answer(options: list[Option], arguments: list[str]) -> dict[str, object]:
    try:
        return dict(parse(options, arguments))
    except UsageError as error:
        return {"error": error.message}


def test_every_command_line_is_read_as_boost_reads_it() -> None:
    """boost.json holds the answers of Boost 1.74, by boost_peer.cpp."""
    assert len(CASES) > 400
    for case in CASES:
        options = _options(case["options"])
        flags = {option.name for option in options if option.kind == FLAG}
        wanted = {name: [] if name in flags else values for name, values in case["answer"].items()}
        assert _answer(options, case["arguments"]) == wanted, case


@given(st.sampled_from(sorted(COMMANDS)), st.data())
def test_every_prefix_means_its_option(name: str, data: st.DataObject) -> None:
    """In every command each prefix of an option that no other one shares can stand for it."""
    options = COMMANDS[name].options
    option = data.draw(st.sampled_from(options))
    prefix = option.name[: data.draw(st.integers(1, len(option.name)))]
    value = data.draw(st.text(min_size=1).filter(lambda text: not text.startswith("-")))
    ways = [[f"--{prefix}"], [f"-{option.short}"]]
    wanted: dict[str, list[str]] = {option.name: []}
    if option.kind != FLAG:
        ways = [[f"--{prefix}", value], [f"--{prefix}={value}"]]
        ways += [[f"-{option.short}", value], [f"-{option.short}{value}"]]
        wanted = {option.name: [value]}
    if sum(other.name.startswith(prefix) for other in options) == 1:
        assert [parse(options, way) for way in ways] == [wanted] * len(ways)


@settings(max_examples=30)
@given(st.lists(st.lists(st.from_regex(r"[0-9]{1,4}:[0-9]{1,4}", fullmatch=True), min_size=1), min_size=1))
def test_ranges_may_be_many_and_repeated(groups: list[list[str]]) -> None:
    arguments = [word for group in groups for word in ("--ranges", *group)]
    wanted = [word for group in groups for word in group]
    options = COMMANDS["markdirtyblock"].options
    assert parse(options, [*arguments, "-d", "/dev/sdb", "extra"])["ranges"] == wanted
    assert parse(options, ["-d", "/dev/sdb", "extra", *arguments])["ranges"] == wanted


@given(st.sampled_from(sorted(COMMANDS)), st.lists(st.text()))
def test_no_command_line_is_a_mistake_of_ours(name: str, arguments: list[str]) -> None:
    answer = _answer(list(COMMANDS[name].options), arguments)
    assert set(answer) <= {"error"} | {option.name for option in COMMANDS[name].options}


def test_no_option_shares_its_first_letter() -> None:
    """So `--d` always is --device; a new option that broke this would break scripts."""
    for one in COMMANDS.values():
        assert len({option.name[0] for option in one.options}) == len(one.options)
        assert len({option.short for option in one.options}) == len(one.options)


def test_older_words_lead_somewhere() -> None:
    assert {command(word) for word in ALIASES} <= set(COMMANDS.values())
    assert not set(REPLACED) & (set(COMMANDS) | set(ALIASES))
    assert command("tracker_remove") is COMMANDS["detach"]
    assert command("bogus") is None


@pytest.mark.parametrize(
    ("text", "sectors"),
    [
        ("512", 1), ("1023", 1), ("1K", 2), ("50M", 102400), ("3G", 6291456), ("1GiB", 0), ("1.5G", 2097152),
        ("2g", 0), ("2048k", 4), (" 1K", 2), ("+1K", 2), ("-1K", -2), ("1M2K", 2), ("0" * 5000 + "1K", 2),
        ("9223372036854775807", (1 << 54) - 1),
    ],
)  # fmt: skip
def test_limits(text: str, sectors: int) -> None:
    assert numbers.limit_sectors(text) == sectors


@pytest.mark.parametrize("text", ["", "G", "x1", "9223372036854775808", "--1", ".5G", "9" * 5000])
def test_a_limit_that_is_no_number(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        numbers.limit_sectors(text)
    assert caught.value.message == "stoll"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1000", 1000), ("10s", 10), ("-1", (1 << 32) - 1), ("2147483648", "stoi"), ("", "stoi"), ("x", "stoi")],
)
def test_timeouts(text: str, wanted: int | str) -> None:
    try:
        assert numbers.timeout_ms(text) == wanted
    except UsageError as error:
        assert error.message == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0:8", (0, 8)), ("2048:1", (2048, 1)), (" 5:6x", (5, 6)), ("1:2:3", (1, 2)), ("-1:1", ((1 << 64) - 1, 1)),
        ("08", "Invalid format of range string."), ("", "Invalid format of range string."), ("a:1", "stoull"),
        ("1:", "stoull"), (":1", "stoull"), ("18446744073709551616:1", "stoull"),
    ],
)  # fmt: skip
def test_ranges(text: str, wanted: tuple[int, int] | str) -> None:
    try:
        assert numbers.sector_ranges([text]) == [wanted]
    except UsageError as error:
        assert error.message == wanted
