# SPDX-License-Identifier: Apache-2.0
"""The special characters of a terminal in images.

`c_cc` is a list of numbers of 32 bits, but criu copies the bytes of its C structure over them: four characters to a
number, in the first eight. The other eleven are whatever lay in its memory. Image sets of ours from before that was
seen have one character in each number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from stasis.process.images.damage import damaged

__all__ = ["pack", "unpack"]

NUMBERS = 19
"""criu refuses fewer: TERMIOS_NCC, which is the kernel's NCCS (include/uapi/asm-generic/termbits.h)."""
PACKED = struct.Struct("<8I")
"""As many bytes as the C library's structure has: its NCCS is 32."""
MARK = 0x100
"""More than a character, in a number that criu does not look at: tells our sets from those before."""


def pack(characters: bytes) -> list[int]:
    """What an image has for these."""
    numbers = PACKED.unpack(characters.ljust(PACKED.size, b"\0"))
    return [*numbers, *[0] * (NUMBERS - len(numbers) - 1), MARK]


def unpack(numbers: Sequence[int], path: str) -> bytes:
    """The NUMBERS characters that an image, whose `path` is for the error, has. DamagedError where they are too few."""
    if len(numbers) < NUMBERS:
        raise damaged(path, 0, "a terminal has too few special characters")
    if max(numbers) < MARK:
        return bytes(numbers[:NUMBERS])
    return PACKED.pack(*numbers[:8])[:NUMBERS]
