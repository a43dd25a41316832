# SPDX-License-Identifier: Apache-2.0
"""What the commands share that read backups in place: which ones, and how much memory for their chunks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stasis.cli.backup.options import add_latest, add_repository
from stasis.cli.options import size

if TYPE_CHECKING:
    from stasis.backup.serve.opening import Wanted

__all__ = ["add_reading", "wanted"]


def add_reading(parser: argparse.ArgumentParser) -> None:
    """--host, --device, --cache and the repository."""
    add_latest(parser)
    parser.add_argument("--cache", metavar="SIZE", type=size, default=64 << 20,
                        help="memory for chunks that were read or are read ahead (default 64M)")
    add_repository(parser)


def wanted(
    arguments: argparse.Namespace, ids: Sequence[str], *, against: Sequence[str] = (), overlay: str | None = None
) -> Wanted:
    """What these options choose."""
    from stasis.backup.serve.opening import Wanted

    return Wanted(ids, against, arguments.host, arguments.device, overlay, arguments.cache)
