# SPDX-License-Identifier: Apache-2.0
"""Comparing a target with the image, byte by byte: after a copy, and on a sample of what should not have
changed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from stasis.block.copy.plan import Window
from stasis.block.copy.target import Target
from stasis.errors import VerifyError
from stasis.linux import files, memory
from stasis.linux.iobuffer import IoBuffer

__all__ = ["Comparison"]

# Longest piece that is compared at a time.
COMPARE_SIZE = 1 << 20


class Comparison:
    """Handler of windows that reads the target at the same places and raises VerifyError at the first
    difference.

    ``explanation`` and ``hint`` go into the error. Each thread that uses it should have its own buffer, so
    one is made per call: a mapping of 1 MiB, which is small against the reading.
    """

    def __init__(self, target: Target, explanation: str, hint: str) -> None:
        self._descriptor = target.descriptor
        self._sparse = not target.is_block_device
        self._path: Path = target.path
        self._explanation = explanation
        self._hint = hint

    def __call__(self, window: Window, image: IoBuffer) -> None:
        with IoBuffer(COMPARE_SIZE) as found:
            position = 0
            for offset, length in window.reads:
                self._compare(offset, length, image, position, found)
                position += length
            for offset, length in window.zeroes:
                self._expect_zeroes(offset, length, found)

    def _compare(self, offset: int, length: int, image: IoBuffer, position: int, found: IoBuffer) -> None:
        for start in range(0, length, COMPARE_SIZE):
            count = min(COMPARE_SIZE, length - start)
            self._read(offset + start, count, found)
            different = memory.first_difference(image.address + position + start, found.address, count)
            if different is not None:
                raise self._difference(offset + start + different)

    def _expect_zeroes(self, offset: int, length: int, found: IoBuffer) -> None:
        for data_offset, data_length in self._data_in(offset, length):
            for start in range(0, data_length, COMPARE_SIZE):
                count = min(COMPARE_SIZE, data_length - start)
                self._read(data_offset + start, count, found)
                if not memory.is_zero(found.address, count):
                    nonzero = next(i for i, byte in enumerate(found.view[:count]) if byte)
                    raise self._difference(data_offset + start + nonzero)

    def _data_in(self, offset: int, length: int) -> list[tuple[int, int]]:
        if not self._sparse:
            return [(offset, length)]
        # SEEK_DATA moves the file position, which nothing here uses: all reads and writes say where.
        extents = files.data_extents(self._descriptor, offset, length)
        return [(start, count) for start, count, is_data in extents if is_data]

    def _read(self, offset: int, length: int, buffer: IoBuffer) -> None:
        view = buffer.view[:length]
        while view:
            got = os.preadv(self._descriptor, [view], offset)
            if not got:
                raise OSError(errno.EIO, "the target is shorter than the image", os.fspath(self._path))
            view, offset = view[got:], offset + got

    def _difference(self, offset: int) -> VerifyError:
        return VerifyError(
            f"{self._path} differs from the image at offset {offset}: {self._explanation}", hint=self._hint
        )
