# SPDX-License-Identifier: Apache-2.0
"""`key add`, `remove` and `list`, in `stasis repo` and in `stasis backup`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the commands."""
