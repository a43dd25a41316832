# SPDX-License-Identifier: Apache-2.0
"""What the caller decides about open files."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["FileOptions"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Each field is an option of the command line.

    `ghost_limit`: how many bytes a deleted file may occupy on its disk to be taken along. `external`: unix sockets by
    inode whose other end is not in the tree. `shell_job`: the terminal is the caller's. `file_locks`: take locks along.
    `inherited`: for the restore, descriptors of the caller by the name of what they stand for, as `pipe:[123]`.
    """

    ghost_limit: int = 64 * MIB
    external_unix: bool = False
    shell_job: bool = False
    file_locks: bool = False
    inherited: dict[str, int] = field(default_factory=dict)
