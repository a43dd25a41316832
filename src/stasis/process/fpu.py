# SPDX-License-Identifier: Apache-2.0
"""Floating point and vector state: the processor's XSAVE area, and the fields that an image has for it.

The image has no place for AMX tiles (B4 of the format's description), so their state is not kept; `lost_components`
tells. The area begins with the 512 bytes of FXSAVE and a header of 64 bytes (Intel SDM volume 1, 10.5 and 13.4).
"""

from __future__ import annotations

import struct

from stasis.errors import UnsupportedError
from stasis.linux import cpuid
from stasis.process.images.schema.registers import UserX86FpregsEntry, UserX86XsaveEntry

__all__ = ["from_image", "lost_components", "to_image"]

LEGACY = struct.Struct("<HHBxHQQII32I64I24I")
LEGACY_BYTES = 512
HEADER_BYTES = 64
X87, SSE, AVX, BNDREGS, BNDCSR, OPMASK, ZMM_HI256, HI16_ZMM, PKRU = *range(8), 9
NAMES = {17: "AMX tile configuration", 18: "AMX tiles"}

# Component: field of the image's message, and the format of its elements.
FIELDS = {
    AVX: ("ymmh_space", "I"),
    BNDREGS: ("bndreg_state", "Q"),
    BNDCSR: ("bndcsr_state", "Q"),
    OPMASK: ("opmask_reg", "Q"),
    ZMM_HI256: ("zmm_upper", "Q"),
    HI16_ZMM: ("hi16_zmm", "Q"),
    PKRU: ("pkru", "I"),
}


def to_image(area: bytes) -> UserX86FpregsEntry:
    """The image's message for the XSAVE area of a thread."""
    cwd, swd, twd, fop, rip, rdp, mxcsr, mask, *rest = LEGACY.unpack_from(area)
    entry = UserX86FpregsEntry(cwd=cwd, swd=swd, twd=twd, fop=fop, rip=rip, rdp=rdp, mxcsr=mxcsr, mxcsr_mask=mask,
                               st_space=rest[:32], xmm_space=rest[32:96], padding=rest[96:])  # fmt: skip
    if len(area) >= LEGACY_BYTES + HEADER_BYTES:
        entry.xsave = _components(area)
    return entry


def _components(area: bytes) -> UserX86XsaveEntry:
    places = cpuid.xsave_components()
    in_use = _in_use(area)
    known = sum(1 << number for number in (X87, SSE, *FIELDS) if in_use >> number & 1)
    entry = UserX86XsaveEntry(xstate_bv=known)
    for number, (name, letter) in FIELDS.items():
        if number in places and sum(places[number]) <= len(area):
            setattr(entry, name, _unpack(area, *places[number], letter))
    return entry


def _unpack(area: bytes, offset: int, size: int, letter: str) -> list[int]:
    return list(struct.unpack_from(f"<{size // struct.calcsize(letter)}{letter}", area, offset))


def _in_use(area: bytes) -> int:
    """Bits of the components that are not in their initial state."""
    return int(struct.unpack_from("<Q", area, LEGACY_BYTES)[0])


def lost_components(area: bytes) -> list[str]:
    """What of a thread's state has no place in an image."""
    if len(area) < LEGACY_BYTES + HEADER_BYTES:
        return []
    in_use = _in_use(area)
    return [
        NAMES.get(number, f"state component {number}")
        for number in cpuid.xsave_components()
        if number not in FIELDS and in_use >> number & 1
    ]


def from_image(entry: UserX86FpregsEntry, current: bytes) -> bytes:
    """The XSAVE area for a thread, made from the one that it has now, whose layout is this processor's.

    Raises UnsupportedError where the image uses what this processor does not have.
    """
    area = bytearray(current)
    words = (*_sized(entry.st_space, 32), *_sized(entry.xmm_space, 64), *_sized(entry.padding, 24))
    LEGACY.pack_into(area, 0, entry.cwd, entry.swd, entry.twd, entry.fop, entry.rip, entry.rdp, entry.mxcsr,
                     entry.mxcsr_mask, *words)  # fmt: skip
    if len(area) < LEGACY_BYTES + HEADER_BYTES:
        return bytes(area)
    in_use = 1 << X87 | 1 << SSE if entry.xsave is None else entry.xsave.xstate_bv
    if entry.xsave is not None:
        _put_components(area, entry.xsave, in_use)
    struct.pack_into("<Q", area, LEGACY_BYTES, in_use)
    return bytes(area)


def _put_components(area: bytearray, entry: UserX86XsaveEntry, in_use: int) -> None:
    places = cpuid.xsave_components()
    for number, (name, letter) in FIELDS.items():
        values: list[int] = getattr(entry, name)
        if number in places and sum(places[number]) <= len(area):
            offset, size = places[number]
            count = size // struct.calcsize(letter)
            struct.pack_into(f"<{count}{letter}", area, offset, *_sized(values, count))
        elif in_use >> number & 1:
            raise UnsupportedError(
                f"the image uses {name}, which this processor does not have",
                hint="restore it on a machine with the features of the one that it was dumped on",
            )


def _sized(values: list[int], count: int) -> list[int]:
    """Exactly so many: images from elsewhere may have fewer."""
    return [*values[:count], *(0,) * (count - len(values))]
