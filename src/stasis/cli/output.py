# SPDX-License-Identifier: Apache-2.0
"""How results and errors are printed: tables for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from stasis.errors import StasisError
from stasis.units import format_size

__all__ = ["print_error", "print_fields", "print_json", "print_json_line", "print_table", "printable",
           "size_text"]


def print_json(value: Any) -> None:
    """One JSON document; model objects become objects with all their fields."""
    print(_json(value, indent=2))


def print_json_line(value: Any) -> None:
    """One JSON document on one line, at once."""
    print(_json(value), flush=True)


def _json(value: Any, indent: int | None = None) -> str:
    import json
    from dataclasses import asdict

    return json.dumps(value, indent=indent, default=asdict)


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as they must be; nothing at all without rows."""
    if not rows:
        return
    lines = [list(head), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """A line per field that has a value."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        if value is not None:
            print(f"{name:<{width}}  {_text(value)}")


def size_text(value: int | None) -> str | None:
    """A size for people."""
    return None if value is None else format_size(value)


def printable(text: str) -> str:
    """Text from strangers as a terminal may see it: what is no character, or would move its cursor, is escaped."""
    shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in shown)


def _text(value: object) -> str:
    return "-" if value is None else printable(str(value))


def print_error(error: StasisError, *, as_json: bool) -> None:
    """One sentence, and a hint if there is one, on standard error; with --json one JSON object there."""
    if as_json:
        print(_json(error.as_dict()), file=sys.stderr)
        return
    print(f"stasis: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
