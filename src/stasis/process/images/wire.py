# SPDX-License-Identifier: Apache-2.0
"""Protobuf's wire encoding: varints, zigzag numbers, and the parts that a schema does not know.

Only what proto2 messages of an image set need (https://protobuf.dev/programming-guides/encoding/). Every length is
checked against the end of the buffer before it is used; what is wrong raises WireError with its offset.
"""

from __future__ import annotations

__all__ = [
    "FIXED32",
    "FIXED64",
    "LENGTH",
    "VARINT",
    "WireError",
    "read_length",
    "read_varint",
    "signed",
    "skip",
    "unzigzag",
    "varint",
    "zigzag",
]

# Wire types. 3 and 4 (groups) are deprecated and occur in no image.
VARINT = 0
FIXED64 = 1
LENGTH = 2
FIXED32 = 5

_U64 = (1 << 64) - 1
_LONGEST = 10  # bytes of a varint
_SMALL = [bytes([value]) for value in range(0x80)]


class WireError(ValueError):
    """Bytes that are no message: `reason`, and `offset` into the buffer."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.reason = reason
        self.offset = offset


def varint(value: int) -> bytes:
    """`value` in 7-bit groups, lowest first; a negative number as its 64-bit two's complement."""
    if 0 <= value < 0x80:
        return _SMALL[value]
    value &= _U64
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(buffer: bytes, offset: int, end: int) -> tuple[int, int]:
    """The unsigned 64-bit number at `offset`, and the offset behind it."""
    value = shift = 0
    for at in range(offset, min(end, offset + _LONGEST)):
        byte = buffer[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    else:
        raise WireError("a number is cut off" if end < offset + _LONGEST else "a number has more than 64 bits", offset)
    if value > _U64:
        raise WireError("a number has more than 64 bits", offset)
    return value, at + 1


def read_length(buffer: bytes, offset: int, end: int) -> tuple[int, int]:
    """Begin and end of the bytes behind the length at `offset`."""
    length, begin = read_varint(buffer, offset, end)
    if length > end - begin:
        raise WireError(f"{length} bytes are announced and {end - begin} are left", offset)
    return begin, begin + length


def skip(buffer: bytes, tag: int, offset: int, end: int) -> int:
    """The offset behind the value of a field that the schema does not have."""
    wire_type = tag & 7
    if tag >> 3 == 0 or tag >= 1 << 32 or wire_type not in (VARINT, FIXED64, LENGTH, FIXED32):
        raise WireError(f"{tag:#x} begins no field", offset)
    if wire_type == VARINT:
        return read_varint(buffer, offset, end)[1]
    if wire_type == LENGTH:
        return read_length(buffer, offset, end)[1]
    behind = offset + (8 if wire_type == FIXED64 else 4)
    if behind > end:
        raise WireError("a number is cut off", offset)
    return behind


def signed(value: int) -> int:
    """The number whose 64-bit two's complement is `value`."""
    return value - (1 << 64) if value >> 63 else value


def zigzag(value: int) -> int:
    """Small unsigned numbers for small signed ones: 0, -1, 1, -2 ... become 0, 1, 2, 3 ..."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unzigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return value >> 1 ^ -(value & 1)
