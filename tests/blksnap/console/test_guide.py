# SPDX-License-Identifier: Apache-2.0
"""The guide's page of blksnap, its manual page and its completions keep up with the tool."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from stasis.blksnap.console.commands import ALIASES, COMMANDS, REPLACED
from stasis.blksnap.console.grammar import parse
from tools import build_man

PAGE = build_man.GUIDE / "blksnap.md"
SECTIONS = build_man.guide_sections(PAGE)


def test_every_command_has_its_section_and_no_other_has() -> None:
    described = {title.removeprefix("blksnap ") for title in SECTIONS if title.startswith("blksnap ")}
    assert described == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_described(name: str) -> None:
    described = re.findall(r"^\| `-(.), --(\w+)` \|", SECTIONS[f"blksnap {name}"], re.MULTILINE)
    wanted = {(option.short, option.name) for option in COMMANDS[name].options if option.name != "help"}
    assert set(described) == wanted


def test_every_older_word_is_described() -> None:
    words = re.findall(r"^\| `(\w+)` \|", SECTIONS["Older words"], re.MULTILINE)
    assert set(words) == {*ALIASES, *REPLACED}


def test_every_example_can_be_read() -> None:
    blocks = "".join(re.findall(r"^```\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    examples = re.findall(r"(?:^|\$\()blksnap ([^|)&#\n]*)", blocks, re.MULTILINE)
    assert len(examples) > 10
    for example in examples:
        name, *words = shlex.split(example)
        assert parse(COMMANDS[name].options, words)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str) -> None:
    pytest.importorskip("shtab")
    command = [sys.executable, "-m", "stasis", "completion", shell, "--command", "blksnap"]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "snapshot_waitevent" in script
    assert "--ranges" in script
    subprocess.run(["bash", "-n"], input=script if shell == "bash" else "", text=True, check=True)


@pytest.mark.parametrize("arguments", [["help"], ["snapshot_create", "--help"], ["attach", "--bogus"]])
def test_help_and_mistakes_load_nothing_heavy(arguments: list[str]) -> None:
    """Nothing of the daemon, and not argparse: a script calls the tool many times."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stasis.cli.blksnap.main", *arguments],
        capture_output=True,
        text=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "stasis.blksnap.console.grammar" in loaded
    heavy = {"argparse", "asyncio", "ctypes", "stasis.daemon.client", "subprocess", "varlink"}
    assert not loaded & heavy
