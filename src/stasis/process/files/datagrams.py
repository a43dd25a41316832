# SPDX-License-Identifier: Apache-2.0
"""UDP datagrams that came and were not read yet, with where they came from.

They are looked at without taking them out (SO_PEEK_OFF, socket(7)). A restore sends them once more, to the socket
alone and within the machine: over the loopback interface, through a raw socket that names the old sender. Where another
socket could get them they are not sent. CRIU's images have no place for a sender; the image `stasis-datagrams.img` is
our own. What raw and ICMP sockets have not read is not sent again: other sockets and the kernel itself would answer it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from stasis.process.files.queues import peeking
from stasis.process.helpers import apart
from stasis.process.images.damage import damaged
from stasis.process.images.schema.sockets import DatagramEntry

if TYPE_CHECKING:
    from stasis.process.files.kind import Opened, Saving

__all__ = ["Datagram", "is_waiting", "keep", "peeked", "put_back", "why_not_kept"]

SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
UDP_GRO = 104  # include/uapi/linux/udp.h
LARGEST = 1 << 16
MOST_BYTES = 64 << 20
FRAME = struct.Struct("<III")
UDP_HEADER = struct.Struct(">4H")
IPV4_HEADER = struct.Struct(">BBHHHBBH4s4s")
IPV6_HEADER = struct.Struct(">IHBB16s16s")
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
MAPPED = bytes(10) + b"\xff\xff"
LINK_LOCAL = b"\xfe\x80"
HOPS = 64


class Datagram(NamedTuple):
    """`address` and `port` are the sender's; an IPv4 address has 4 bytes, also where an IPv6 socket got it."""

    address: bytes
    port: int
    data: bytes


def is_waiting(sock: socket.socket) -> bool:
    """Whether there is a datagram to be read, be it an empty one."""
    return bool(_events(sock) & select.POLLIN)


def why_not_kept(sock: socket.socket) -> str:
    """Why what waits in a socket cannot be looked at, or not be sent again."""
    if (sock.type, sock.proto) != (socket.SOCK_DGRAM, socket.IPPROTO_UDP):
        return "they are no UDP"
    if _events(sock) & select.POLLERR:
        return "an error waits with them, which to look would take away"
    if sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO):
        return "the kernel may have joined some of them (UDP_GRO)"
    return ""


def _events(sock: socket.socket) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return sum(events for _, events in poll.poll(0))


def peeked(sock: socket.socket) -> Iterator[Datagram]:
    """All that waits, in order, which waits on."""
    with peeking(sock):
        while True:
            try:
                data, sender = sock.recvfrom(LARGEST, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            raw = socket.inet_pton(sock.family, sender[0].partition("%")[0])
            yield Datagram(raw.removeprefix(MAPPED) if len(raw) == 16 else raw, sender[1], data)


def keep(sock: socket.socket, number: int, saving: Saving) -> None:
    """Write what waits in the socket that has the id `number`. The program's own looks begin at another place meanwhile
    (SO_PEEK_OFF), which must not stay so."""
    what = "the datagrams that wait in a socket cannot be looked at"
    told = apart(what, lambda: b"".join(map(_packed, peeked(sock))))
    for found in _unpacked(told):
        entry = DatagramEntry(id_for=number, length=len(found.data), address=found.address, port=found.port)
        saving.out.image("stasis-datagrams").append(entry, found.data)


def _packed(one: Datagram) -> bytes:
    return FRAME.pack(len(one.address), one.port, len(one.data)) + one.address + one.data


def _unpacked(told: bytes) -> Iterator[Datagram]:
    at = 0
    while at < len(told):
        address, port, length = FRAME.unpack_from(told, at)
        at += FRAME.size
        yield Datagram(told[at : at + address], port, told[at + address : at + address + length])
        at += address + length


def put_back(made: Collection[int], opened: Opened) -> None:
    """Send what waited in the sockets with these ids once more, to each its own. What does not come is told of."""
    for number, wanted in _read(opened).items():
        if number not in made:
            continue  # it is the caller's, who has it
        with socket.socket(fileno=socket.dup(opened.open(number))) as sock:
            if reason := _why_not_sent(sock, wanted) or _send(sock, wanted):
                own = sock.getsockname()
                with contextlib.suppress(OSError):  # nobody wants to hear of it
                    print(f"stasis: {len(wanted)} datagrams that waited in a UDP socket ({own[0]} port {own[1]}) are "
                          f"lost: {reason}", file=sys.stderr, flush=True)  # fmt: skip


def _read(opened: Opened) -> dict[int, list[Datagram]]:
    found: dict[int, list[Datagram]] = {}
    if not opened.images.has("stasis-datagrams"):
        return found
    path, size = opened.images.file_path("stasis-datagrams"), 0
    with opened.images.image("stasis-datagrams") as image:
        for record in image:
            entry = record.message
            assert isinstance(entry, DatagramEntry)
            size += entry.length
            is_whole = entry.length < LARGEST and entry.port < 1 << 16 and len(entry.address) in (4, 16)
            if not is_whole or size > MOST_BYTES:
                raise damaged(path, record.offset, "there is no such datagram")
            data = image.read(record.parts[0])
            found.setdefault(entry.id_for, []).append(Datagram(entry.address, entry.port, data))
    return found


def _why_not_sent(sock: socket.socket, wanted: list[Datagram]) -> str:
    with socket.socket() as ours:
        if len({each.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8) for each in (sock, ours)}) > 1:
            return "it is in another network namespace than the tree's first process"
    if any(one.address.startswith(LINK_LOCAL) for one in wanted):
        return "senders with link-local addresses are on a link, which this machine is not"
    port = sock.getsockname()[1]
    users = 0
    for name in ("udp", "udp6"):
        with open(f"/proc/self/net/{name}") as file:
            ports = (int(line.split()[1].rpartition(":")[2], 16) for line in file.readlines()[1:])
            users += sum(each == port for each in ports)
    return "" if users == 1 else "another socket has the same port, and could get them"


def _send(sock: socket.socket, wanted: list[Datagram]) -> str:
    """Why not all of them came; "" if they did."""
    before = list(peeked(sock))
    try:
        for one in wanted:
            _send_one(sock, one)
    except OSError as error:
        return f"they cannot be sent again: {error.strerror}"
    return "" if list(peeked(sock))[len(before) :] == wanted else "the socket did not get all of them"


def _send_one(sock: socket.socket, one: Datagram) -> None:
    """Routing takes what is sent to an address of this machine to the loopback interface, whoever the sender is."""
    family = socket.AF_INET if len(one.address) == 4 else socket.AF_INET6
    own, port = sock.getsockname()[:2]
    raw = socket.inet_pton(sock.family, own.partition("%")[0])
    target = raw.removeprefix(MAPPED) if len(raw) == 16 else raw
    if own == ANY[sock.family] or len(target) != len(one.address):
        target = socket.inet_pton(family, LOOPBACK[family])
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
        sender.sendto(_packet(one, target, port), (socket.inet_ntop(family, target), 0))


def _packet(one: Datagram, target: bytes, port: int) -> bytes:
    """With its IP header; that of IPv4 gets its checksum from the kernel (raw(7))."""
    length = UDP_HEADER.size + len(one.data)
    head = UDP_HEADER.pack(one.port, port, length, 0)
    pseudo = one.address + target + struct.pack(">II", length, socket.IPPROTO_UDP)
    head = UDP_HEADER.pack(one.port, port, length, _checksum(pseudo + head + one.data) or 0xFFFF)
    if len(target) == 4:
        whole = IPV4_HEADER.size + length
        ip = IPV4_HEADER.pack(0x45, 0, whole, 0, 0, HOPS, socket.IPPROTO_UDP, 0, one.address, target)
    else:
        ip = IPV6_HEADER.pack(6 << 28, length, socket.IPPROTO_UDP, HOPS, one.address, target)
    return ip + head + one.data


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
