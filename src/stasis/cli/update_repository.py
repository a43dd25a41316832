# SPDX-License-Identifier: Apache-2.0
"""`update-img` where the image is a repository: the snapshot becomes an incremental backup there."""

from __future__ import annotations

import os

__all__ = ["is_repository", "update_repository"]


def is_repository(image: str) -> bool:
    """Whether what was named as the image can be no image: a directory, or the URL of an object store."""
    return "://" in image or os.path.isdir(image)


def update_repository(minor: int, url: str) -> None:
    """Back up the snapshot of a tracer, reading what changed since the backup of an earlier one and nothing else.

    Raises StasisError: GenerationError or NotFoundError if there is no backup to go on from.
    """
    from stasis.backup.progress import Progress
    from stasis.backup.repo import Repository, Secrets
    from stasis.daemon.backups import BackupJob, back_up

    with Repository.open(url, Secrets.from_environment(environment=os.environ)) as repository:
        back_up(BackupJob(sources=[f"datto:{minor}"], kind="incremental"), repository, Progress())
