# SPDX-License-Identifier: Apache-2.0
"""`make figures`: write what the bench measured into README and docs/figures.md, so that no figure is typed by hand.

figures.py RESULT.json...: a row of a later file replaces the same row of an earlier one, since a bench may be run group
by group. What was measured with --quick is refused: it only shows that the bench runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures: make figures -->", "<!-- end of figures -->"
README_ROWS = (
    "randread-nbdkit",
    "randread-qemu",
    "randwrite-nbdkit",
    "randwrite-qemu",
    "cow-random-qemu",
    "cow-sequential-qemu",
    "image-randread-qemu",
    "hold-8-devices",
    "backup-full",
    "backup-incremental",
    "backup-restore",
    "backup-verify",
    "live-tracking-direct",
    "live-tracking-time",
    "live-freeze",
    "live-incremental",
    "process-pages",
    "process-frozen-small",
    "process-start-small",
)

Row = dict[str, Any]
Result = dict[str, Any]


class FiguresError(Exception):
    """A result file that cannot be used."""


def load(path: Path) -> Result:
    """One result of the bench. Raises FiguresError."""
    result: Result = json.loads(path.read_text())
    if result["settings"].get("quick"):
        raise FiguresError(f"{path} was measured with --quick, which measures nothing")
    return result


def rows(results: Sequence[Result]) -> dict[str, Row]:
    """The newest row of each name, in the order in which they first appear."""
    found: dict[str, Row] = {}
    for result in results:
        found |= {row["name"]: row for row in result["rows"]}
    return found


def number(row: Row, value: float) -> str:
    return f"{value:.2f}" if row["unit"] == "x" else f"{value:.3g} {row['unit']}"


def spread(row: Row) -> str:
    """Median, and in brackets the least and the greatest of the rounds."""
    if not row["values"]:
        return f"not run: {row['note']}"
    if row["min"] == row["max"]:
        return number(row, row["median"])
    return f"{number(row, row['median'])} ({number(row, row['min'])} to {number(row, row['max'])})"


def target(row: Row) -> str:
    if row["limit"] is None:
        return ""
    missed = ", missed" if row["reached"] is False else ""
    return f"{'at least' if row['at_least'] else 'at most'} {number(row, row['limit'])}{missed}"


def table(chosen: Sequence[Row]) -> str:
    lines = ["| work | measured | wanted |", "|---|---|---|"]
    lines += [f"| {row['title']} | {spread(row)} | {target(row)} |" for row in chosen]
    return "\n".join(lines)


def conditions(result: Result) -> str:
    """Where and how it was measured, as a sentence."""
    host, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} ({version})" for name, version in result["versions"].items())
    return (
        f"Measured {result['time'][:10]} on {host['cpus']} cores ({host['architecture']}, kernel {host['kernel']}, "
        f"{host['memory_gib']} GiB, Python {host['python']}), {settings['rounds']} alternating rounds of "
        f"{settings['seconds']:g} s: median, least and greatest. Beside: {versions}."
    )


def page(results: Sequence[Result]) -> str:
    """docs/figures.md."""
    return (
        "# Figures\n\nRatios of stasis to another program, or to itself under other circumstances, and values.\n"
        "`make bench`, `make bench-backup` and `make bench-process` measure them again. A ratio of rates above 1 is\n"
        "in favour of stasis.\n\n"
        f"{conditions(results[-1])}\n\n{table(list(rows(results).values()))}\n"
    )


def excerpt(results: Sequence[Result]) -> str:
    """The part of the readme between its two marks."""
    found = rows(results)
    chosen = [found[name] for name in README_ROWS if name in found and found[name]["values"]]
    return f"{table(chosen)}\n\n{conditions(results[-1])} All of them: [figures](docs/figures.md)."


def replaced(text: str, part: str) -> str:
    """`text` with what is between the marks replaced. Raises FiguresError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FiguresError("README.md has no marks for figures")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print("usage: figures.py RESULT.json...", file=sys.stderr)
        return 2
    try:
        results = [load(Path(argument)) for argument in arguments]
        readme = replaced((ROOT / "README.md").read_text(), excerpt(results))
    except (FiguresError, OSError, ValueError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 1
    (ROOT / "README.md").write_text(readme)
    (ROOT / "docs" / "figures.md").write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
