# SPDX-License-Identifier: Apache-2.0
"""What a device or file holds, by the marks that file systems, partition tables and volume managers leave.

A restore looks here before it overwrites something. The table has what a Linux machine is likely to meet; places and
marks are those of libblkid (util-linux, libblkid/src/superblocks and /partitions). A false alarm costs an option on
the command line, so a mark alone is enough and no checksum is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

__all__ = ["probe"]

_KIB = 1 << 10
_PAGES = (4 * _KIB, 8 * _KIB, 16 * _KIB, 64 * _KIB)

# name, offset in bytes, mark
_SIGNATURES: tuple[tuple[str, int, bytes], ...] = (
    ("an ext2, ext3 or ext4 file system", 0x438, b"\x53\xef"),
    ("an XFS file system", 0, b"XFSB"),
    ("a Btrfs file system", 0x10040, b"_BHRfS_M"),
    ("an F2FS file system", 0x400, b"\x10\x20\xf5\xf2"),
    ("a bcache device", 0x1018, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")),
    ("a bcachefs file system", 0x1018, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    ("a ReiserFS file system", 0x10034, b"ReIsEr"),
    ("a JFS file system", 0x8000, b"JFS1"),
    ("a NILFS2 file system", 0x406, b"\x34\x34"),
    ("a GFS2 file system", 0x10000, b"\x01\x16\x19\x70"),
    ("an OCFS2 file system", 0x800, b"OCFSV2"),
    ("an EROFS file system", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("a SquashFS file system", 0, b"hsqs"),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("a FAT file system", 0x36, b"FAT1"),
    ("a FAT file system", 0x52, b"FAT32   "),
    ("a BitLocker volume", 3, b"-FVE-FS-"),
    ("an HFS+ file system", 0x400, b"H+"),
    ("an HFSX file system", 0x400, b"HX"),
    ("an APFS container", 0x20, b"NXSB"),
    ("an ISO 9660 file system", 0x8001, b"CD001"),
    ("a UDF file system", 0x8001, b"BEA01"),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("a LUKS volume", 0x4000, b"SKUL\xba\xbe"),
    ("a dm-integrity device", 0, b"integrt\0"),
    ("a dm-verity hash tree", 0, b"verity\0\0"),
    ("a VDO volume", 0, b"dmvdo001"),
    ("a Ceph BlueStore device", 0, b"bluestore block device"),
    ("an Oracle ASM disk", 0x20, b"ORCLDISK"),
    ("a Linux RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    ("a Linux RAID member", 0x1000, b"\xfc\x4e\x2b\xa9"),
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a GPT partition table", 512, b"EFI PART"),
    ("a GPT partition table", 4096, b"EFI PART"),
    ("a partition table or boot sector", 510, b"\x55\xaa"),
)
# lib/format_text/label: the label is in one of the first four sectors, its type 24 bytes into it.
_LVM_SECTORS = range(0, 2048, 512)
# vdev_impl.h: a ring of uberblocks in the second half of each 256 KiB label, written in either byte order.
_ZFS_RING = range(128 * _KIB, 256 * _KIB, _KIB)
_ZFS_MAGIC = (bytes.fromhex("0cb1ba0000000000"), bytes.fromhex("0000000000bab10c"))


def probe(descriptor: int, size: int) -> list[str]:
    """What the marks in `size` bytes of an open file or device tell: phrases for messages; empty if nothing.

    Raises OSError when it cannot be read.
    """

    def at(offset: int, length: int) -> bytes:
        return os.pread(descriptor, length, offset) if 0 <= offset < size else b""

    head = at(0, 256 * _KIB)
    found = [name for name, offset, mark in _SIGNATURES if head.startswith(mark, offset)]
    found += _in_ranges(head)
    found += _by_size(at, size)
    return list(dict.fromkeys(found))


def _in_ranges(head: bytes) -> Iterator[str]:
    if any(head.startswith(b"LABELONE", start) and head.startswith(b"LVM2", start + 24) for start in _LVM_SECTORS):
        yield "an LVM physical volume"
    if any(head.startswith(_ZFS_MAGIC, start) for start in _ZFS_RING):
        yield "a ZFS pool member"
    if any(head[page - 10 : page] in (b"SWAPSPACE2", b"SWAP-SPACE") for page in _PAGES):
        yield "swap space"


def _by_size(at: Callable[[int, int], bytes], size: int) -> Iterator[str]:
    """Marks whose place is counted from the end."""
    # include/uapi/linux/raid/md_p.h: version 0.90 in the last whole 64 KiB; version 1.0 8 KiB from the end.
    old, late = (size & ~0xFFFF) - 0x10000, ((size >> 9) - 16 & ~7) << 9
    if at(old, 4) in (b"\xfc\x4e\x2b\xa9", b"\xa9\x2b\x4e\xfc") or at(late, 4) == b"\xfc\x4e\x2b\xa9":
        yield "a Linux RAID member"
    # UEFI specification, "GPT overview": the backup header is in the last logical block.
    if any(at(size - block, 8) == b"EFI PART" for block in (512, 4096)):
        yield "a GPT partition table"
