# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them, in binary units: `64K`, `1.5G`, `2TiB`; and times: `200ms`, `2s`.

Every size that a user gives or reads goes through here, so that `64K` means the same everywhere.
"""

from __future__ import annotations

import re

from stasis.errors import UsageError

__all__ = ["format_size", "parse_seconds", "parse_size"]

_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Compiled when a size is read first: every command imports this, few read one.
_SIZE = r"([0-9]{1,20})(?:\.([0-9]{1,20}))?\s*([KMGT]?)(?:i?B)?"
_TIME = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m)?"
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
_LARGEST = (1 << 63) - 1  # loff_t: no file or device is larger
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str) -> int:
    """Bytes meant by `text`: a whole number, or a number with K, M, G or T (powers of 1024).

    A fraction must come out as whole bytes: `1.5K` is 1536, `0.3` is refused. Raises UsageError.
    """
    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise UsageError(f"{text[:80]!r} is not a size", hint="Write a number with K, M, G or T, as in 64K.")
    whole, fraction, unit = match[1], match[2] or "", match[3].upper()
    size, rest = divmod(int(whole + fraction) * _FACTORS[unit], int("1" + "0" * len(fraction)))
    if rest:
        raise UsageError(f"{text!r} is not a whole number of bytes", hint="Use a smaller unit.")
    if size > _LARGEST:
        raise UsageError(f"{text!r} is larger than any device", hint="The largest size is 8388607T.")
    return size


def parse_seconds(text: str) -> float:
    """Seconds meant by `text`: a number with `ms`, `s` (or nothing) or `m`. Raises UsageError."""
    match = re.fullmatch(_TIME, text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"{text[:80]!r} is not a time", hint="Write a number with ms, s or m, as in 200ms.")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def format_size(size: int) -> str:
    """`size` in bytes as text: exact where a unit divides it (`64 KiB`), else one decimal (`1.5 GiB`)."""
    if size < 0:
        return "-" + format_size(-size)
    exponent = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    if exponent + 1 < len(_UNITS) and round(size / (1 << 10 * exponent), 1) == 1024:
        exponent += 1  # 1048575 is 1.0 MiB, not 1024.0 KiB
    whole, rest = divmod(size, 1 << 10 * exponent)
    number = str(whole) if rest == 0 else f"{size / (1 << 10 * exponent):.1f}"
    unit = "byte" if size == 1 else _UNITS[exponent]
    return f"{number} {unit}"
