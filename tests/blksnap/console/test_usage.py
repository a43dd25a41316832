# SPDX-License-Identifier: Apache-2.0
"""The help of blksnap's tool: all commands, in order, their options laid out as Boost lays them out."""

from __future__ import annotations

import re

from stasis.blksnap.console import usage
from stasis.blksnap.console.commands import COMMANDS
from stasis.blksnap.console.grammar import FLAG, MANY, ONE, Option

BOOST = """\
  -h [ --help ]         Print usage for command.
  -d [ --device ] arg   Device name.
  -r [ --ranges ] arg   Sectors range in format 'sector:count'. It's multitoken
                        argument, and the text is rather long so that it must
                        be wrapped."""
"""The lines of Boost 1.74, but for the blank that it leaves at the end of a wrapped line."""


def test_the_table_of_options_is_that_of_boost() -> None:
    text = ("Sectors range in format 'sector:count'. It's multitoken argument, and the text is rather long so that it "
            "must be wrapped.")  # fmt: skip
    options = [Option("help", "h", FLAG, "Print usage for command."), Option("device", "d", ONE, "Device name."),
               Option("ranges", "r", MANY, text)]  # fmt: skip
    assert usage.options_table(options) == BOOST


def test_help_lists_all_commands_in_the_order_of_the_alphabet() -> None:
    shown = re.findall(r"^  blksnap ([a-z_]+) ", usage.all_commands(), re.MULTILINE)
    assert shown == sorted(COMMANDS)
    assert usage.all_commands().startswith("Usage:\n")


def test_help_of_a_command_shows_its_options_and_no_others() -> None:
    for command in COMMANDS.values():
        shown = re.findall(r"^  -(.) \[ --([a-z]+) \]", usage.of_command(command), re.MULTILINE)
        assert shown == [(option.short, option.name) for option in command.options]


def test_no_line_of_a_table_is_too_long() -> None:
    for command in COMMANDS.values():
        assert max(map(len, usage.options_table(command.options).splitlines())) <= usage.LINE_LENGTH
