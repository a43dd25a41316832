# SPDX-License-Identifier: Apache-2.0
"""Backups read in place: as NBD exports, read-only or with scratch space, and what differs between two of them."""

from stasis.backup.serve.diff import Difference, diff
from stasis.backup.serve.foreground import Listener, serve
from stasis.backup.serve.opening import Wanted, open_backups, open_cache, open_index, open_lease

__all__ = [
    "Difference", "Listener", "Wanted", "diff", "open_backups", "open_cache", "open_index", "open_lease", "serve",
]
