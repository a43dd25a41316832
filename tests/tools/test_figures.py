# SPDX-License-Identifier: Apache-2.0
"""Figures in the documents come from the bench, whole and with their spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import figures

ROOT = Path(__file__).parents[2]


def _row(name: str, values: list[float], **fields: Any) -> dict[str, Any]:
    row = {"name": name, "title": f"title of {name}", "unit": "x", "limit": 1.3, "at_least": True, "note": ""}
    measured = {"min": min(values), "median": sorted(values)[len(values) // 2], "max": max(values)} if values else {}
    return {**row, "values": values, **measured, "reached": True, **fields}


def _result(*rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    machine = {"cpus": 2, "architecture": "x86_64", "kernel": "6.1", "memory_gib": 8, "python": "3.11.2"}
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "settings": {"rounds": 5, "seconds": 4.0, "quick": False, **settings},
        "machine": machine,
        "versions": {"fio": "fio-3.33"},
        "rows": list(rows),
    }


def test_a_figure_is_shown_with_its_spread_and_target() -> None:
    text = figures.page([_result(_row("randread-nbdkit", [1.5, 1.4, 1.6]))])
    assert "| title of randread-nbdkit | 1.50 (1.40 to 1.60) | at least 1.30 |" in text
    assert "2 cores" in text
    assert "fio-3.33" in text


def test_a_missed_target_and_a_row_that_did_not_run_are_told() -> None:
    missed = _row("hold-8-devices", [25.0], unit="ms", limit=20.0, at_least=False, reached=False)
    absent = _row("disk-again", [], note="needs root", reached=None)
    text = figures.page([_result(missed, absent)])
    assert "| 25 ms | at most 20 ms, missed |" in text
    assert "| not run: needs root |" in text


def test_a_later_run_replaces_the_rows_it_has() -> None:
    found = figures.rows([_result(_row("a", [1.0]), _row("b", [2.0])), _result(_row("b", [3.0]))])
    assert {name: row["values"] for name, row in found.items()} == {"a": [1.0], "b": [3.0]}


def test_a_quick_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(_result(_row("a", [1.0]), quick=True)))
    assert figures.main([str(path)]) == 1
    assert "--quick" in capsys.readouterr().err


def test_the_readme_has_a_place_for_them() -> None:
    text = (ROOT / "README.md").read_text()
    assert figures.replaced(text, "FIGURES").count("FIGURES") == text.count("FIGURES") + 1


def test_text_without_marks_is_left_alone() -> None:
    with pytest.raises(figures.FiguresError):
        figures.replaced("# stasis", "FIGURES")
