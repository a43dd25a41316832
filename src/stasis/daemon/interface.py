# SPDX-License-Identifier: Apache-2.0
"""The varlink interface file, for server and client alike."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FILE", "NAME", "description"]

NAME = "org.stasis"
FILE = Path(__file__).with_name(f"{NAME}.varlink")


def description() -> str:
    """The text of the interface definition."""
    return FILE.read_text()
