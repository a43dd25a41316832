# SPDX-License-Identifier: Apache-2.0
"""What a COW file must look like, written down a second time and as plainly as can be, from docs/formats/datto-cow.md.

Shares no code with stasis.datto: blocks are keys of a dictionary, and the file is put together from them at the end.
"""

from __future__ import annotations

import struct


class CowModel:
    """A COW file of a device of `size` bytes."""

    def __init__(self, size: int, fsize: int, uuid: bytes, seqid: int, version: int = 1) -> None:
        self.blocks = (size + 4095) // 4096
        self.sections = (self.blocks + 4095) // 4096
        self.data_offset = 4096 + self.sections * 4096 * 8
        self.fsize, self.uuid, self.seqid, self.version = fsize, uuid, seqid, version
        self.index: dict[int, int] = {}
        self.data: list[bytes] = []
        self.changed = 0
        self.clean = self.index_only = False

    def overwrite(self, block: int, old: bytes) -> None:
        """The device's block is about to be overwritten."""
        self.changed += block not in self.index
        if self.index_only:
            self.index[block] = 1
        elif block not in self.index:
            self.index[block] = self.data_offset // 4096 + len(self.data)
            self.data.append(old.ljust(4096, b"\0"))

    def to_incremental(self) -> None:
        self.index_only = True
        self.fsize = self.data_offset

    def file(self) -> bytes:
        """The whole file."""
        flags = (1 if self.clean else 0) + (2 if self.index_only else 0)
        fpos = self.data_offset // 4096 + len(self.data)
        header = struct.pack("<IIQQQ16sQQ", 4776, flags, fpos, self.fsize, self.seqid, self.uuid, self.version,
                             self.changed if self.version else 0)
        index = bytearray(self.sections * 4096 * 8)
        for block, value in self.index.items():
            struct.pack_into("<Q", index, block * 8, value)
        whole = header.ljust(4096, b"\0") + bytes(index)
        if not self.index_only:
            whole += b"".join(self.data)
        return whole.ljust(self.fsize, b"\0")
