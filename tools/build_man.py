# SPDX-License-Identifier: Apache-2.0
"""`make man`: manual pages from one source: options from the argument parser, prose from the user guide.

`docs/guide/GROUP.md` has a section `## stasis GROUP VERB` per command; its text becomes the command's description
and the parser's help the list of its options. The tables of exit codes and settings are taken as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from stasis import __version__
from stasis.cli.blksnap.parser import build_parser as build_blksnap_parser
from stasis.cli.main import build_parser
from tools.roff import escape, from_markdown

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
TOOLS = {"dbdctl": "control dattobd's tracers", "update-img": "bring a copy of a dattobd snapshot up to the next"}
"""Console scripts with a section in the guide to `stasis datto`."""
SUMMARY = "snapshot block devices while they are written, and know what changed"


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name and parser of each subcommand, in the order of the help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All parsers that run something: those without subcommands below them."""
    below = subparsers(parser)
    if not below:
        yield parser
    for child in below.values():
        yield from commands(child)


def guide_sections(page: Path) -> dict[str, str]:
    """Text below each heading of second order of a guide page; what stands before the first is under ''."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    head = parts[0].partition("\n")[2]
    return {"": head, **dict(zip(parts[1::2], parts[2::2], strict=True))}


def options_text(parser: argparse.ArgumentParser) -> str:
    """The arguments and options of a command as a list of roff."""
    lines = []
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        lines += [".TP", rf"\fB{escape(invocation(parser, action))}\fR", escape(help_of(parser, action))]
    return "\n".join(lines)


def invocation(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """How help shows an option, with its value: `--limit SIZE`."""
    return parser._get_formatter()._format_action_invocation(action)


def help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def head(title: str, summary: str) -> list[str]:
    """Title and NAME section. No date: the same source gives the same page."""
    header = f'.TH "{title.upper()}" "1" "" "stasis {__version__}" "stasis manual"'
    return [header, ".SH NAME", rf"{escape(title)} \- {escape(summary)}"]


def group_page(name: str, parser: argparse.ArgumentParser, pages: list[str]) -> str:
    """The page `stasis-NAME`: a section per command, with its usage, its prose and its options."""
    sections = guide_sections(GUIDE / f"{name}.md")
    lines = head(f"stasis-{name}", (parser.description or SUMMARY).rstrip("."))
    lines += [".SH DESCRIPTION", from_markdown(sections[""])]
    for command in commands(parser):
        lines += [f".SH {command.prog.upper()}", usage(command), from_markdown(sections[command.prog])]
        lines += [options_text(command)]
    return "\n".join([*lines, *see_also(f"stasis-{name}", pages)]) + "\n"


def blksnap_page(pages: list[str]) -> str:
    """The page `blksnap`: a section per command, then what is left of the guide's page."""
    sections = guide_sections(GUIDE / "blksnap.md")
    lines = head("blksnap", "snapshot block devices with the words of blksnap's console tool")
    lines += [".SH DESCRIPTION", from_markdown(sections.pop(""))]
    for command in commands(build_blksnap_parser()):
        lines += [f".SH {command.prog.upper()}", usage(command), from_markdown(sections.pop(command.prog))]
    for title, text in sections.items():
        lines += [f".SH {escape(title.upper())}", from_markdown(text)]
    return "\n".join([*lines, *see_also("blksnap", pages)]) + "\n"


def main_page(parser: argparse.ArgumentParser, pages: list[str]) -> str:
    """The page `stasis`: what it is, the list of commands, exit codes, settings."""
    introduction = (GUIDE.parents[1] / "README.md").read_text().split("\n## ")[0].partition("\n")[2]
    lines = head("stasis", SUMMARY)
    lines += [".SH SYNOPSIS", usage(parser), ".SH DESCRIPTION", from_markdown(introduction), ".SH COMMANDS"]
    for command in commands(parser):
        lines += [".TP", rf"\fB{escape(command.prog)}\fR", escape(command.description or "")]
    lines += [".SH EXIT STATUS", from_markdown(guide_sections(GUIDE / "exit-codes.md")[""])]
    lines += [".SH SETTINGS", from_markdown(guide_sections(GUIDE / "settings.md")[""])]
    return "\n".join([*lines, *see_also("stasis", pages)]) + "\n"


def tool_page(name: str, summary: str, pages: list[str]) -> str:
    """The page of a console script of its own: its section of `docs/guide/datto.md`."""
    lines = [*head(name, summary), ".SH DESCRIPTION", from_markdown(guide_sections(GUIDE / "datto.md")[name])]
    return "\n".join([*lines, *see_also(name, pages)]) + "\n"


def usage(parser: argparse.ArgumentParser) -> str:
    text = " ".join(parser.format_usage().partition(": ")[2].split())
    return rf"\fB{escape(text)}\fR"


def see_also(this: str, pages: list[str]) -> list[str]:
    others = [page for page in pages if page != this]
    return [".SH SEE ALSO", ", ".join(rf"\fB{escape(page)}\fR(1)" for page in others)]


def build(target: Path) -> list[Path]:
    """Write all pages into `target` and return their paths."""
    target.mkdir(parents=True, exist_ok=True)
    parser = build_parser()
    groups = {name: child for name, child in subparsers(parser).items() if (GUIDE / f"{name}.md").exists()}
    pages = ["stasis", *(f"stasis-{name}" for name in groups), "blksnap", *TOOLS]
    texts = {"stasis": main_page(parser, pages)}
    texts |= {f"stasis-{name}": group_page(name, child, pages) for name, child in groups.items()}
    texts["blksnap"] = blksnap_page(pages)
    texts |= {name: tool_page(name, summary, pages) for name, summary in TOOLS.items()}
    for name, text in texts.items():
        (target / f"{name}.1").write_text(text)
    return [target / f"{name}.1" for name in texts]


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: build_man.py DIRECTORY", file=sys.stderr)
        return 2
    for path in build(Path(sys.argv[1])):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
