# SPDX-License-Identifier: Apache-2.0
"""Numbers as blksnap's console tool reads them: with C++'s stoi, stoll and stoull, whose names are its error texts.

Leading blanks, a sign and the digits that follow count; what stands behind them does not. So `12abc` is 12.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from stasis.errors import UsageError

__all__ = ["SECTOR", "limit_sectors", "sector_ranges", "timeout_ms"]

SECTOR = 512
"""Bytes of a sector, whatever the device's own sectors are."""

_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?)0*([0-9]+)")
_LONGEST = 20  # digits of 64 bits; Python refuses numbers of thousands
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_UNSIGNED = 1 << 64


def limit_sectors(text: str) -> int:
    """Sectors of a limit in bytes, rounded down. Only K, M and G at its very end multiply: `1GiB` is one byte.

    Raises UsageError `stoll` for what does not begin with a number, or has one of more than 63 bits.
    """
    number = _integer(text, "stoll", -(1 << 63), 1 << 63)
    return number * _UNITS.get(text[-1:], 1) // SECTOR


def timeout_ms(text: str) -> int:
    """Milliseconds, as the unsigned number of 32 bits that the kernel is given. Raises UsageError `stoi`."""
    return _integer(text, "stoi", -(1 << 31), 1 << 31) % (1 << 32)


def sector_ranges(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(sector, count) of each SECTOR:COUNT. Raises UsageError with the tool's sentence, or `stoull`."""
    return [_sector_range(text) for text in texts]


def _sector_range(text: str) -> tuple[int, int]:
    sector, colon, count = text.partition(":")
    if not colon:
        raise UsageError("Invalid format of range string.", hint="write SECTOR:COUNT, as in 2048:8")
    return _unsigned(sector), _unsigned(count)


def _unsigned(text: str) -> int:
    return _integer(text, "stoull", 1 - _UNSIGNED, _UNSIGNED) % _UNSIGNED


def _integer(text: str, function: str, low: int, end: int) -> int:
    match = _NUMBER.match(text)
    if match is not None and len(match[2]) <= _LONGEST and low <= (number := int(match[1] + match[2])) < end:
        return number
    raise UsageError(function, hint=f"{text[:80]!r} is no number that fits")
