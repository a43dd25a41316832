# SPDX-License-Identifier: Apache-2.0
"""The kinds of open files that are kept."""

from __future__ import annotations

from stasis.process.files.kind import FileKind
from stasis.process.files.pipes import Pipes
from stasis.process.files.regular import RegularFiles

__all__ = ["all_kinds"]


def all_kinds() -> list[FileKind]:
    """New instances, for one dump or one restore."""
    return [RegularFiles(), Pipes()]
