# SPDX-License-Identifier: Apache-2.0
"""What raw sockets of IPv4 and IPv6 have beside what all internet sockets have (raw(7), ipv6(7))."""

from __future__ import annotations

import socket
import struct

from stasis.process.images.schema.sockets import IpOptsRawEntry

__all__ = ["options_of_raw", "peer_words", "set_raw_options"]

# include/uapi/linux/in.h, include/uapi/linux/in6.h, include/uapi/linux/icmp.h, include/uapi/linux/icmpv6.h
IP_HDRINCL, IP_NODEFRAG, IPV6_HDRINCL = 3, 22, 36
SOL_RAW, ICMP_FILTER, ICMPV6_FILTER = 255, 1, 1
FILTER = struct.Struct("=I")
FILTER6 = struct.Struct("=8I")


def options_of_raw(sock: socket.socket) -> IpOptsRawEntry:
    """The message for a raw socket's own options."""
    is_6 = sock.family == socket.AF_INET6
    level, name = (socket.IPPROTO_IPV6, IPV6_HDRINCL) if is_6 else (socket.IPPROTO_IP, IP_HDRINCL)
    entry = IpOptsRawEntry(hdrincl=bool(sock.getsockopt(level, name)) or None)
    if not is_6:
        entry.nodefrag = bool(sock.getsockopt(socket.IPPROTO_IP, IP_NODEFRAG)) or None
        if sock.proto == socket.IPPROTO_ICMP:
            entry.icmpv_filter = list(FILTER.unpack(sock.getsockopt(SOL_RAW, ICMP_FILTER, FILTER.size)))
    elif sock.proto == socket.IPPROTO_ICMPV6:
        raw = sock.getsockopt(socket.IPPROTO_ICMPV6, ICMPV6_FILTER, FILTER6.size)
        entry.icmpv_filter = list(FILTER6.unpack(raw))
    return entry


def set_raw_options(sock: socket.socket, entry: IpOptsRawEntry) -> None:
    """Set on a raw socket what was set on another one."""
    is_6 = sock.family == socket.AF_INET6
    level, name = (socket.IPPROTO_IPV6, IPV6_HDRINCL) if is_6 else (socket.IPPROTO_IP, IP_HDRINCL)
    sock.setsockopt(level, name, int(entry.hdrincl or False))
    if entry.nodefrag and not is_6:
        sock.setsockopt(socket.IPPROTO_IP, IP_NODEFRAG, 1)
    words = entry.icmpv_filter
    if sock.proto == socket.IPPROTO_ICMP and len(words) == 1:
        sock.setsockopt(SOL_RAW, ICMP_FILTER, FILTER.pack(*words))
    if sock.proto == socket.IPPROTO_ICMPV6 and len(words) == 8:
        sock.setsockopt(socket.IPPROTO_ICMPV6, ICMPV6_FILTER, FILTER6.pack(*words))


def peer_words(family: int, inode: int) -> list[int]:
    """The address that a raw socket is connected to, as words of this machine; [] where it is not. The kernel does not
    tell it the socket itself, whose peer has no port."""
    name = "/proc/net/raw6" if family == socket.AF_INET6 else "/proc/net/raw"
    with open(name) as file:
        for line in file.readlines()[1:]:
            fields = line.split()
            if int(fields[9]) == inode:
                address = fields[2].partition(":")[0]
                words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
                return words if any(words) else []
    return []
