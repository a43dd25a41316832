# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them in a decoded image: flags by name, devices as major:minor, addresses, hexadecimal.

A field's `show` names its notation. The texts are crit's wherever crit has one, and `parse` takes numbers, the
texts of `text`, and those of crit. Only task states differ: crit calls a stopped task a zombie.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from typing import Any, Final

from stasis.process.images.message import HEX, Field

__all__ = ["flag_names", "parse", "parse_list", "text", "text_list"]

ADDRESS: Final = "address"

# <bits/fcntl-linux.h>, <sys/mman.h>, <linux/fcntl.h>; the VMA_ and PE_ bits are the reference's and CRIU's names.
_FLAGS: Final[dict[str, dict[str, int]]] = {
    "open": {
        "O_WRONLY": 1, "O_RDWR": 2, "O_CREAT": 0o100, "O_EXCL": 0o200, "O_NOCTTY": 0o400, "O_TRUNC": 0o1000,
        "O_APPEND": 0o2000, "O_NONBLOCK": 0o4000, "O_DSYNC": 0o10000, "FASYNC": 0o20000, "O_DIRECT": 0o40000,
        "O_LARGEFILE": 0o100000, "O_DIRECTORY": 0o200000, "O_NOFOLLOW": 0o400000, "O_NOATIME": 0o1000000,
        "O_CLOEXEC": 0o2000000,
    },
    "prot": {"PROT_READ": 1, "PROT_WRITE": 2, "PROT_EXEC": 4},
    "map": {"MAP_SHARED": 1, "MAP_PRIVATE": 2, "MAP_ANON": 0x20, "MAP_GROWSDOWN": 0x100},
    "vma": {
        "VMA_AREA_REGULAR": 0x1, "VMA_AREA_STACK": 0x2, "VMA_AREA_VSYSCALL": 0x4, "VMA_AREA_VDSO": 0x8,
        "VMA_AREA_HEAP": 0x20, "VMA_FILE_PRIVATE": 0x40, "VMA_FILE_SHARED": 0x80, "VMA_ANON_SHARED": 0x100,
        "VMA_ANON_PRIVATE": 0x200, "VMA_AREA_SYSVIPC": 0x400, "VMA_AREA_SOCKET": 0x800, "VMA_AREA_VVAR": 0x1000,
        "VMA_AREA_AIORING": 0x2000, "VMA_AREA_MEMFD": 0x4000, "VMA_AREA_SHSTK": 0x8000, "VMA_AREA_GUARD": 0x10000,
        "VMA_AREA_UPROBES": 0x20000, "VMA_EXT_PLUGIN": 0x8000000, "VMA_UNSUPP": 0x80000000,
    },
    "pagemap": {"PE_PARENT": 1, "PE_LAZY": 2, "PE_PRESENT": 4},
    "seals": {
        "F_SEAL_SEAL": 1, "F_SEAL_SHRINK": 2, "F_SEAL_GROW": 4, "F_SEAL_WRITE": 8, "F_SEAL_FUTURE_WRITE": 16,
        "F_SEAL_EXEC": 32,
    },
}  # fmt: skip

_NAMES: Final[dict[str, dict[str, int]]] = {
    "task_state": {"TASK_ALIVE": 1, "TASK_DEAD": 2, "TASK_STOPPED": 3},
    "family": {"UNIX": 1, "INET": 2, "INET6": 10, "NETLINK": 16, "PACKET": 17},
    "socket_type": {"STREAM": 1, "DGRAM": 2, "RAW": 3, "SEQPACKET": 5, "PACKET": 10},
    "protocol": {"IP": 0, "ICMP": 1, "TCP": 6, "UDP": 17, "ICMPV6": 58, "UDPLITE": 136, "RAW": 255},
    "socket_state": {
        "ESTABLISHED": 1, "SYN_SENT": 2, "SYN_RECV": 3, "FIN_WAIT1": 4, "FIN_WAIT2": 5, "TIME_WAIT": 6, "CLOSE": 7,
        "CLOSE_WAIT": 8, "LAST_ACK": 9, "LISTEN": 10, "CLOSING": 11,
    },
}  # fmt: skip

# What crit prints and we do not.
_ALSO: Final = {"Alive": 1, "Zombie": 3, "Stopped": 6, "VMA_AREA_NONE": 0}


def text(field: Field, value: int, show: str = "") -> Any:
    """A number in its field's notation, or as it is where that has no word for it."""
    show = field.show or show
    if show in _FLAGS:
        return flag_names(show, value)
    if show in _NAMES:
        return next((name for name, number in _NAMES[show].items() if number == value), value)
    if show == "dev":  # the kernel's own encoding, include/linux/kdev_t.h
        return f"{value >> 20}:{value & 0xFFFFF}"
    if show == "odev":  # as in struct stat
        return f"{os.major(value)}:{os.minor(value)}"
    return f"{value:#x}" if show == HEX else value


def flag_names(show: str, value: int) -> str:
    """The names of the bits that are set, and what has none in hexadecimal: "O_RDWR | 0x80000000"."""
    names = [name for name, bit in _FLAGS[show].items() if value & bit]
    rest = value & ~sum(_FLAGS[show].values())
    return " | ".join([*names, *([f"{rest:#x}"] if rest else [])])


def parse(field: Field, written: object) -> int:
    """The number that `text` wrote, or that stands there as one. ValueError."""
    if isinstance(written, bool) or not isinstance(written, int | str):
        raise ValueError(f"{written!r:.80} is no number")
    if isinstance(written, int):
        return written
    if field.show in ("dev", "odev") and ":" in written:
        major, _, minor = written.partition(":")
        return os.makedev(int(major), int(minor)) if field.show == "odev" else int(major) << 20 | int(minor)
    words = {**_ALSO, **_FLAGS.get(field.show, {}), **_NAMES.get(field.show, {})}
    value = 0
    for word in written.split("|") if written else []:
        value |= words[word.strip()] if word.strip() in words else int(word, 0)
    return value


def text_list(field: Field, values: list[int], show: str = "") -> list[Any]:
    """Numbers in their field's notation; the words of an internet address become one text."""
    if field.show == ADDRESS and len(values) in (1, 4):
        packed = struct.pack(f"={len(values)}I", *values)  # network order in memory, as in struct in_addr
        return [str(ipaddress.ip_address(packed))]
    return [text(field, value, show) for value in values]


def parse_list(field: Field, written: list[Any]) -> list[int]:
    """The inverse of `text_list`. ValueError."""
    if field.show != ADDRESS:
        return [parse(field, item) for item in written]
    values: list[int] = []
    for item in written:
        if isinstance(item, str) and ("." in item or ":" in item):
            packed = ipaddress.ip_address(item).packed
            values += struct.unpack(f"={len(packed) // 4}I", packed)
        else:
            values.append(parse(field, item))
    return values
