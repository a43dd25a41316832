# SPDX-License-Identifier: Apache-2.0
"""Getting backups back: to a file, a block device or a stream, onto an older restore, and verified.

Everything that leaves a repository here has been compared with its digest first.
"""

from stasis.backup.restore.applying import ApplyOptions, apply
from stasis.backup.restore.checking import VerifyResult, verify
from stasis.backup.restore.job import RestoreOptions, RestoreResult
from stasis.backup.restore.live import verify_live
from stasis.backup.restore.stream import restore_to_stream
from stasis.backup.restore.whole import restore

__all__ = [
    "ApplyOptions",
    "RestoreOptions",
    "RestoreResult",
    "VerifyResult",
    "apply",
    "restore",
    "restore_to_stream",
    "verify",
    "verify_live",
]
