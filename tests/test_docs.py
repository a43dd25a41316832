# SPDX-License-Identifier: Apache-2.0
"""The documents keep up with the code: links lead somewhere, commands, exit codes and settings are all described."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from stasis.block.settings import Settings
from stasis.cli.main import build_parser
from stasis.errors import ExitCode, StasisError
from tools import build_man

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS = [command.prog for command in build_man.commands(build_parser())]


def _table(page: str) -> dict[str, list[str]]:
    """First cell of each row and the others, without code marks."""
    rows = re.findall(r"^\| `?([^|`]+?)`? \| (.*) \|$", (GUIDE / page).read_text(), re.MULTILINE)
    return {first: [cell.strip() for cell in rest.split(" | ")] for first, rest in rows}


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if not linked.exists() or (anchor and anchor not in _anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_can_be_found_from_the_readme(page: Path) -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        current = todo.pop()
        if current in seen or not current.exists():
            continue
        seen.add(current)
        links = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", current.read_text())
        todo += [(current.parent / link).resolve() for link in links if ":" not in link]
    assert page.resolve() in {path.resolve() for path in seen}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_guide(command: str) -> None:
    assert [page.name for page in GUIDE.glob("*.md") if command in build_man.guide_sections(page)] != []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_has_help(command: str) -> None:
    parser = next(parser for parser in build_man.commands(build_parser()) if parser.prog == command)
    assert [action.dest for action in parser._actions if not action.help] == []


def test_the_guide_describes_no_command_that_does_not_exist() -> None:
    described = {
        heading
        for page in GUIDE.glob("*.md")
        for heading in build_man.guide_sections(page)
        if heading.startswith("stasis ")
    }
    assert described <= set(COMMANDS)


def test_every_example_is_accepted_by_the_parser() -> None:
    """Commands in the code blocks of README and guide parse; shell parts and variables are cut off first."""
    parser = build_parser()
    examples = [line for page in [ROOT / "README.md", *GUIDE.glob("*.md")] for line in _examples(page)]
    assert len(examples) > 20
    refused = [example for example in examples if not _parses(parser, example)]
    assert not refused


def _parses(parser: argparse.ArgumentParser, example: str) -> bool:
    try:
        parser.parse_args(shlex.split(example)[1:])
    except StasisError:
        return False
    except SystemExit as error:
        return error.code == 0  # --help and --version
    return True


def _examples(page: Path) -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    found = []
    for line in "".join(blocks).splitlines():
        match = re.search(r"(?:^|\$\(|\[ |sudo )(stasis [^#|;)<>\]&]*)", line)
        if match:
            known = match[1].replace("$id", "6f1c2a7e-0000-4000-8000-000000000000").replace("$pid", "4711")
            found.append(known.replace("$map", "/a=/b").strip())
    return found


def test_every_exit_code_is_documented_under_its_name() -> None:
    documented = {int(number): cells[0] for number, cells in _table("exit-codes.md").items() if number.isdecimal()}
    assert documented == {int(code): code.name for code in ExitCode}


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {name: cells[0] for name, cells in _table("settings.md").items() if name.islower() and "_" in name}
    assert documented == {field.name: str(field.default) for field in dataclasses.fields(Settings)}


@pytest.mark.tool("groff")
def test_manual_pages_are_without_errors(tmp_path: Path) -> None:
    pages = build_man.build(tmp_path)
    assert {"stasis.1", "stasis-snapshot.1", "stasis-device.1"} <= {page.name for page in pages}
    for page in pages:
        result = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-rHY=0", str(page)], capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (0, ""), page.name
        assert "```" not in result.stdout


@pytest.mark.tool("systemd-analyze")
def test_systemd_units_are_accepted(tmp_path: Path) -> None:
    for unit in (ROOT / "packaging" / "systemd").iterdir():
        text = unit.read_text().replace("/usr/local/bin/stasis", shutil.which("true") or "/bin/true")
        (tmp_path / unit.name).write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    units = sorted(map(str, tmp_path.iterdir()))
    result = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
