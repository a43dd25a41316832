# SPDX-License-Identifier: Apache-2.0
"""What a file system writes about itself whenever anything in it is written: the same twice means that nothing was.

ext4 and XFS do so at every mount for writing. btrfs does only if something changed: whatever does ends in a new
superblock (fs/btrfs/transaction.c).

Every layout here is on-disk format of the kernel: fs/ext4/ext4.h (struct ext4_super_block), fs/xfs/libxfs/xfs_format.h
(struct xfs_dsb), fs/btrfs (struct btrfs_super_block).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct

__all__ = ["read", "read_from"]

PIECE = 1 << 20

EXT_OFFSET, EXT_SIZE, EXT_MAGIC = 1024, 1024, 0xEF53
EXT_STATE = struct.Struct("<HH")  # s_magic, s_state
EXT_STATE_OFFSET = 56
EXT_INCOMPAT_OFFSET, EXT_NEEDS_RECOVERY = 96, 4
EXT_VALID = 1

XFS_MAGIC = b"XFSB"
XFS_LOG_LARGEST = 512 << 20
"""A log is read as a whole; a larger one would hold up the boot for too long."""

BTRFS_OFFSET, BTRFS_SIZE, BTRFS_MAGIC_OFFSET, BTRFS_MAGIC = 65536, 4096, 64, b"_BHRfS_M"


def read(path: str) -> str:
    """The mark of the file system on a device; empty if there is none that tells, or if it was not unmounted in order.

    Reads past the page cache. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        return read_from(fd)
    finally:
        os.close(fd)


def read_from(fd: int) -> str:
    """`read` through a descriptor, past the page cache if that is opened so. Raises OSError."""
    head = _read(fd, 0, 2 * BTRFS_OFFSET)
    return _ext(head) or _btrfs(head) or _xfs(fd, head)


def _read(fd: int, offset: int, length: int) -> bytes:
    """Bytes at multiples of 4096, as far as the device goes."""
    buffer = mmap.mmap(-1, length)
    try:
        return buffer[: os.preadv(fd, [buffer], offset)]
    finally:
        buffer.close()


def _named(kind: str, *parts: bytes) -> str:
    return f"{kind}:{hashlib.sha256(b''.join(parts)).hexdigest()}"


def _ext(head: bytes) -> str:
    block = head[EXT_OFFSET : EXT_OFFSET + EXT_SIZE]
    if len(block) < EXT_SIZE:
        return ""
    magic, state = EXT_STATE.unpack_from(block, EXT_STATE_OFFSET)
    (incompatible,) = struct.unpack_from("<I", block, EXT_INCOMPAT_OFFSET)
    if magic != EXT_MAGIC or not state & EXT_VALID or incompatible & EXT_NEEDS_RECOVERY:
        return ""
    return _named("ext", block)


def _btrfs(head: bytes) -> str:
    block = head[BTRFS_OFFSET : BTRFS_OFFSET + BTRFS_SIZE]
    if block[BTRFS_MAGIC_OFFSET : BTRFS_MAGIC_OFFSET + len(BTRFS_MAGIC)] != BTRFS_MAGIC:
        return ""
    return _named("btrfs", block)


def _xfs(fd: int, head: bytes) -> str:
    """The superblock, and the whole log: each mount writes at another place of it."""
    if head[:4] != XFS_MAGIC:
        return ""
    (block_size,) = struct.unpack_from(">I", head, 4)
    (start,) = struct.unpack_from(">Q", head, 48)
    group_blocks, _, _, log_blocks = struct.unpack_from(">4I", head, 84)
    group_shift = head[124]
    size = log_blocks * block_size
    if not start or not 0 < size <= XFS_LOG_LARGEST or size % 4096:
        return ""
    offset = ((start >> group_shift) * group_blocks + (start & (1 << group_shift) - 1)) * block_size
    digest = hashlib.sha256(head[:512])
    for position in range(0, size, PIECE):
        digest.update(_read(fd, offset + position, min(PIECE, size - position)))
    return f"xfs:{digest.hexdigest()}"
