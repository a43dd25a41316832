#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure stasis beside its peers in one run and hold the figures against what they must reach.

Each figure is a ratio of two measurements that took turns on the same machine within seconds; at least five
rounds, so that min and max say how far it can be trusted. Run as ``make bench``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import report
import rows_backup
import rows_checkpoint
import rows_datto
import rows_disk
import rows_image
import rows_live_copy
import rows_live_tracking
import rows_plain
import rows_process
import rows_snapshot
import rows_tracking
from groups import GROUPS, Bench, Group
from lab import MIB, Lab, LabError, missing_tools, open_lab
from report import Row

from stasis.errors import StasisError

HERE = Path(__file__).resolve().parent
# Importing these registers their groups; this is the order of the table.
ROOMS = (rows_plain, rows_snapshot, rows_disk, rows_tracking, rows_image, rows_process, rows_backup, rows_checkpoint,
         rows_live_tracking, rows_live_copy, rows_datto)


def main() -> int:
    """Exit status 0 when every row that ran reached its target."""
    options = _parse()
    groups = sorted(GROUPS.values(), key=_place)
    chosen = [group for group in groups if group.suite == options.suite and _is_wanted(group, options.only)]
    if options.list:
        for group in groups:
            print(f"{group.suite}: {group.name}: {', '.join(group.rows)}")
        return 0
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode; the first start writes it
    output = options.output or HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d-%H%M}-{options.suite}.json"
    rows = report.load(output) if options.keep else []
    with open_lab(options.directory) as lab:
        bench = _bench(lab, options)
        for group in chosen:
            rows = _replace(rows, _run(group, bench))
            # After each group, so that a run that is stopped leaves what it measured.
            report.save(output, report.as_json(rows, _settings(options, bench)))
    print(report.as_text(rows))
    if options.markdown:
        report.save(options.markdown, report.as_markdown(rows) + "\n")
    print(f"written to {output}", file=sys.stderr)
    return 0 if all(row.reached is not False for row in rows) else 1


def _place(group: Group) -> int:
    """Where a group stands in the table: in the order of ROOMS, and there as written."""
    return [room.__name__ for room in ROOMS].index(group.measure.__module__)


def _replace(rows: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """The rows with those that were measured again in their places, new ones behind."""
    again = {row.name: row for row in measured}
    kept = [again.pop(row.name, row) for row in rows]
    return [*kept, *again.values()]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    suites = ["block", "backup", "process", "live", "datto"]
    parser.add_argument("--suite", choices=suites, default="block", help="what to measure (block)")
    parser.add_argument("--only", action="append", metavar="NAME", help="groups or rows with NAME in their name")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 s on a small image: does it run at all?")
    parser.add_argument("--rounds", type=int, help="alternating rounds (default 5)")
    parser.add_argument("--seconds", type=float, help="length of a measurement bound by time (default 4)")
    parser.add_argument("--size", type=int, metavar="MIB", help="size of the images (default 1024)")
    parser.add_argument("--directory", type=Path, help="where the images are (default: TMPDIR, else /tmp)")
    parser.add_argument("--output", type=Path, help="the JSON result (default: bench/results/<time>.json)")
    parser.add_argument("--keep", action="store_true", help="keep rows of OUTPUT that are not measured again")
    parser.add_argument("--markdown", type=Path, help="write the table as Markdown, too")
    parser.add_argument("--list", action="store_true", help="list groups and their rows")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (2.0 if options.quick else 4.0)
    options.size = options.size or (256 if options.quick else 1024)
    return options


def _is_wanted(group: Group, only: Sequence[str] | None) -> bool:
    names = (group.name, *group.rows)
    return only is None or any(wanted in name for wanted in only for name in names)


def _bench(lab: Lab, options: argparse.Namespace) -> Bench:
    return Bench(lab, options.rounds, options.seconds, options.size * MIB, options.quick, HERE.parent)


def _settings(options: argparse.Namespace, bench: Bench) -> dict[str, object]:
    return {
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "image_mib": options.size,
        "quick": bench.quick,
    }


def _run(group: Group, bench: Bench) -> list[Row]:
    """Measure a group; what keeps it from running is a note in its rows, not the end of the bench."""
    started = time.monotonic()
    print(f"{group.name} …", end=" ", file=sys.stderr, flush=True)
    try:
        _require(group)
        rows = group.measure(bench)
    except (LabError, StasisError) as error:
        rows = [Row(name, name, (), None, note=str(error)) for name in group.rows]
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    print(report.as_text(rows), file=sys.stderr)
    return rows


def _require(group: Group) -> None:
    if absent := missing_tools(*group.tools):
        raise LabError(f"not installed: {', '.join(absent)}")
    if group.needs_root and os.geteuid() != 0:
        raise LabError("needs root for loop devices and the block cgroup")


if __name__ == "__main__":
    raise SystemExit(main())
