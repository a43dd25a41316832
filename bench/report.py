# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of figures: what was measured, what it must reach, and how both are written down."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Row", "as_json", "as_markdown", "as_text", "load", "ratio_row", "save", "value_row"]


RATIO = "x"


@dataclass(frozen=True, slots=True)
class Row:
    """One line: the measured figure per round, and the limit.

    `values` are ratios, or values in `unit`; `samples` are what they were made of, per contestant, in
    `sample_unit`.
    """

    name: str
    title: str
    values: tuple[float, ...]
    limit: float | None
    at_least: bool = True
    unit: str = RATIO
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sample_unit: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        """The middle of the rounds; this is what is held against the limit."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the limit is kept; None without a limit or a value."""
        if self.limit is None or not self.values:
            return None
        return self.median >= self.limit if self.at_least else self.median <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {"min": min(self.values), "median": self.median, "max": max(self.values)} if self.values else {}
        return {**asdict(self), **figures, "reached": self.reached}


def ratio_row(
    name: str,
    title: str,
    ours: Sequence[float],
    peer: Sequence[float],
    limit: float | None,
    names: tuple[str, str],
    sample_unit: str,
) -> Row:
    """A row of ratios, round by round; both sides are rates, more is better."""
    ratios = tuple(a / b for a, b in zip(ours, peer, strict=True))
    samples = {names[0]: tuple(ours), names[1]: tuple(peer)}
    return Row(name, title, ratios, limit, samples=samples, sample_unit=sample_unit)


def value_row(name: str, title: str, values: Iterable[float], limit: float | None, unit: str, note: str = "") -> Row:
    """A row of values of which less is better."""
    return Row(name, title, tuple(values), limit, at_least=False, unit=unit, note=note)


COLUMNS = ("work", "min", "median", "max", "target", "")


def _cells(row: Row) -> tuple[str, ...]:
    if not row.values:
        return (row.title, "-", "-", "-", _limit(row), f"not run: {row.note}")
    verdict = {True: "ok", False: "MISSED", None: ""}[row.reached]
    return (row.title, *(_figure(row, value) for value in _spread(row)), _limit(row), verdict)


def _spread(row: Row) -> tuple[float, float, float]:
    return min(row.values), row.median, max(row.values)


def _figure(row: Row, value: float) -> str:
    return f"{value:.2f}" if row.unit == RATIO else f"{value:.4g} {row.unit}"


def _limit(row: Row) -> str:
    if row.limit is None:
        return ""
    return f"{'≥' if row.at_least else '≤'} {_figure(row, row.limit)}"


def as_text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    table = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for a document."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def as_json(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """All samples, with what is needed to judge them: machine, versions, settings, time."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": dict(settings),
        "machine": _machine(),
        "versions": _versions(),
        "rows": [row.as_dict() for row in rows],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _machine() -> dict[str, Any]:
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "memory_gib": round(int(memory.split()[1]) / (1 << 20)),
        "python": platform.python_version(),
        # Well above the number of CPUs: others used the machine, too, and the spread of the rows shows it.
        "load_average_5_minutes": round(os.getloadavg()[1], 1),
    }


def _versions() -> dict[str, str]:
    programs = {"fio": "fio", "nbdkit": "nbdkit", "nbdcopy": "nbdcopy", "qemu": "qemu-storage-daemon", "borg": "borg"}
    found = {name: _first_line([program, "--version"]) for name, program in programs.items()}
    return found | {"restic": _first_line(["restic", "version"])}


def _first_line(command: list[str]) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return "not installed"
    return text.splitlines()[0] if text else ""


def load(path: Path) -> list[Row]:
    """The rows of an earlier result; none where there is no such file."""
    if not path.exists():
        return []
    names = {each.name for each in fields(Row)}
    stored = json.loads(path.read_text())["rows"]
    return [Row(**{key: value for key, value in row.items() if key in names}) for row in stored]


def save(path: Path, text: str) -> None:
    """Write a result so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
