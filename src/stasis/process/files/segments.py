# SPDX-License-Identifier: Apache-2.0
"""TCP segments that a peer once sent, sent once more to a restored socket: the only way into the states behind a FIN.

They carry the mark that the network lock lets pass (`linux/nftables.py`), and never leave this machine: their target is
an address of ours. Needs CAP_NET_RAW.
"""

from __future__ import annotations

import ipaddress
import socket
import struct

from stasis.linux.nftables import PASSING_MARK

__all__ = ["ACK", "FIN", "send_segment"]

FIN, ACK = 0x01, 0x10
TCP_HEADER = struct.Struct(">HHIIBBHHH")
IPV4_HEADER = struct.Struct(">BBHHHBBH4s4s")
IPV6_HEADER = struct.Struct(">IHBB16s16s")
HEADER_WORDS = 5 << 4
TIME_TO_LIVE = 64
LARGEST_WINDOW = 0xFFFF
MASK = 0xFFFFFFFF

End = tuple[str, int]


def send_segment(source: End, target: End, sequence: int, acknowledged: int, flags: int, window: int) -> None:
    """Send a segment without data from `source`, which is another's address, to `target`, which is ours."""
    addresses = [_address(source[0]), _address(target[0])]
    packed = [address.packed for address in addresses]
    fields = [source[1], target[1], sequence & MASK, acknowledged & MASK, HEADER_WORDS, flags,
              min(window, LARGEST_WINDOW)]  # fmt: skip
    pseudo = packed[0] + packed[1] + struct.pack(">II", TCP_HEADER.size, socket.IPPROTO_TCP)
    segment = TCP_HEADER.pack(*fields, _checksum(pseudo + TCP_HEADER.pack(*fields, 0, 0)), 0)
    if addresses[0].version == 4:
        header = IPV4_HEADER.pack(0x45, 0, IPV4_HEADER.size + len(segment), 0, 0, TIME_TO_LIVE, socket.IPPROTO_TCP, 0,
                                  *packed)  # fmt: skip
    else:
        header = IPV6_HEADER.pack(6 << 28, len(segment), socket.IPPROTO_TCP, TIME_TO_LIVE, *packed)
    family = socket.AF_INET if addresses[0].version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PASSING_MARK)
        sock.sendto(header + segment, (str(addresses[1]), 0))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(text.partition("%")[0])
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
