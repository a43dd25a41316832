# SPDX-License-Identifier: Apache-2.0
"""`backup verify --live`: the origin of a backup as a source, at one instant where it is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stasis.backup.progress import Progress
from stasis.backup.restore import VerifyResult, verify_live
from stasis.daemon.sources import SnapshotStorage, SourceSet
from stasis.errors import UsageError

if TYPE_CHECKING:
    from stasis.backup.repo import Manifest, Repository

__all__ = ["verify_against"]


def verify_against(
    word: str, repository: Repository, manifest: Manifest, *, read_data: bool = False,
    storage: SnapshotStorage | None = None, run_dir: str | Path | None = None, state_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> VerifyResult:  # fmt: skip
    """Compare a backup with what `word` means as a source of a backup: a served device is snapshotted for it.

    Whatever ends it, the snapshot is destroyed. Raises what `SourceSet` and `verify_live` raise.
    """
    if word == "-":
        raise UsageError("standard input is no origin to compare with",
                         hint="name a served device, an image file or a block device")
    with SourceSet([word], storage=storage, run_dir=run_dir, state_dir=state_dir) as sources:
        sources.lock()
        (source,) = sources.take()
        return verify_live(repository, manifest, source, read_data=read_data, progress=progress)
