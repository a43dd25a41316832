# SPDX-License-Identifier: Apache-2.0
"""The process engine: stopping a process tree, writing what it consists of to an image set, and bringing it back.

The image set is CRIU's (docs/formats/process-images.md). Everything that `stasis process` can do:

    import stasis.process

    stasis.process.check(4711)
    stasis.process.dump(4711, "images", stasis.process.DumpOptions(leave_running=True))
    stasis.process.pre_dump(4711, "images-1")
    stasis.process.restore("images").pid

`dump` and `restore` are packages, too; calling them calls the function of that name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stasis.process.dump.job import DumpOptions, DumpResult, check, dump
    from stasis.process.dump.predump import PreDumpResult, pre_dump
    from stasis.process.files.options import FileOptions
    from stasis.process.findings import Finding
    from stasis.process.restore.job import RestoreOptions, RestoreResult, restore

__all__ = [
    "DumpOptions",
    "DumpResult",
    "FileOptions",
    "Finding",
    "PreDumpResult",
    "RestoreOptions",
    "RestoreResult",
    "check",
    "dump",
    "pre_dump",
    "restore",
]

_HOMES = {
    "DumpOptions": "dump.job",
    "DumpResult": "dump.job",
    "FileOptions": "files.options",
    "Finding": "findings",
    "PreDumpResult": "dump.predump",
    "RestoreOptions": "restore.job",
    "RestoreResult": "restore.job",
    "check": "dump.job",
    "pre_dump": "dump.predump",
}


def __getattr__(name: str) -> Any:
    if name in ("dump", "restore"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
