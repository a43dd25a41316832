# SPDX-License-Identifier: Apache-2.0
"""Mounting a backup: served to the kernel by a process of its own, and given back whatever becomes of that process.

Two processes stay behind a mounted backup. The server reads the repository. The guardian makes the block device and
mounts it, and takes both apart when the directory is unmounted, when it is told to end, or when the server dies. If
the guardian dies, the server takes its part. docs/design/backup-mount.md has the cases.
"""

from stasis.backup.mount.command import Mounted, mount, umount

__all__ = ["Mounted", "mount", "umount"]
