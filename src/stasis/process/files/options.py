# SPDX-License-Identifier: Apache-2.0
"""What the caller decides about open files."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["FileOptions"]

MIB = 1 << 20
NOTHING: Mapping[str, int] = MappingProxyType({})


class FileOptions(NamedTuple):
    """Each field is an option of the command line.

    `ghost_limit`: how many bytes a deleted file may occupy on its disk to be taken along. `external`: unix sockets by
    inode whose other end is not in the tree. `shell_job`: the terminal is the caller's. `file_locks`: take locks along.
    `tcp`: "established" keeps TCP connections, "close" has them closed, "" refuses them; `network_lock`: "nftables" has
    their packets dropped from the dump to the restore, "skip" leaves that to the caller. `skip_in_flight`: connections
    that a listener has not accepted yet are left behind. `link_remap`: files that lost their names and have others get
    a link. `outside`: what is left to the restorer to bring, in criu's words: `unix[inode]`, `file[mount:inode]` and
    `tty[rdev:dev]`, in hexadecimal but for the first.
    `inherited`: for the restore, descriptors of the caller by the name of what they stand for, as `pipe:[123]`.
    """

    ghost_limit: int = 64 * MIB
    external_unix: bool = False
    shell_job: bool = False
    file_locks: bool = False
    tcp: str = ""
    network_lock: str = "nftables"
    skip_in_flight: bool = False
    link_remap: bool = False
    outside: frozenset[str] = frozenset()
    inherited: Mapping[str, int] = NOTHING
