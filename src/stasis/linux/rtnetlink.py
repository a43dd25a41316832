# SPDX-License-Identifier: Apache-2.0
"""Network devices, addresses, routes and rules of our network namespace (rtnetlink(7)), as raw messages: what the
kernel tells of one can be sent back to make it again."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from stasis.linux import libc
from stasis.linux.netlink import Attributes, attribute, attributes, nested, string, u32

__all__ = ["ADDRESS", "LINK", "ROUTE", "RULE", "Link", "Message", "RouteNetlink", "parse"]

# include/uapi/linux/rtnetlink.h: RTM_NEW*; RTM_DEL*, RTM_GET* and RTM_SET* follow
LINK, ADDRESS, ROUTE, RULE = 16, 20, 24, 32
GET, SET = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 1, 4, 0x300, 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
ERROR = struct.Struct("=i")
RECEIVE_SIZE = 1 << 16
LINK_MESSAGE = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
BODIES = {LINK: LINK_MESSAGE.size, ADDRESS: 8, ROUTE: 12, RULE: 12}
"""Bytes of the fixed part of each: ifinfomsg, ifaddrmsg, rtmsg, fib_rule_hdr."""

# include/uapi/linux/if_link.h
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_NET_NS_FD, IFLA_LINK_NETNSID = 28, 37
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFF_UP = 1
ARPHRD_LOOPBACK = 772
CHANGEABLE = IFF_UP | 0x80 | 0x100 | 0x200 | 0x1000  # with IFF_NOARP, IFF_PROMISC, IFF_ALLMULTI, IFF_MULTICAST


class Message(NamedTuple):
    """A message of the kernel: its type, the fixed part, and attributes by number; `raw` is all of it."""

    kind: int
    body: bytes
    attributes: Attributes
    raw: bytes


class Link(NamedTuple):
    """A network device. `kind` is that of its driver, "" for those that are not made by users. `number` is its index,
    `peer` that of what it is linked to; `peer_namespace` its namespace's number for us, -1 for our own."""

    number: int
    name: str
    flags: int
    mtu: int
    address: bytes
    kind: str
    is_loopback: bool
    master: int = 0
    peer: int = 0
    peer_namespace: int = -1


def parse(data: bytes) -> Iterator[Message]:
    """The messages of a stream. ValueError where it is none."""
    while data:
        if len(data) < HEADER.size:
            raise ValueError("a message ends within its header")
        length, kind, _, _, _ = HEADER.unpack_from(data)
        size = BODIES.get(kind, 0)
        if not HEADER.size + size <= length <= len(data) or not size:
            raise ValueError(f"there is no message of type {kind} with {length} bytes")
        body = data[HEADER.size : HEADER.size + size]
        yield Message(kind, body, attributes(data[HEADER.size + size : length]), data[:length])
        data = data[-(-length // 4) * 4 :]


class RouteNetlink:
    """A socket for the network namespace that we are in; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, family: int = socket.AF_UNSPEC) -> list[Message]:
        """All of a kind."""
        self._send(kind + GET, NLM_F_DUMP, bytes([family]).ljust(BODIES[kind], b"\0"))
        return [next(parse(raw)) for raw in self._answers()]

    def request(self, kind: int, flags: int, content: bytes, what: str) -> None:
        """Send one message; the kernel's errno where it refuses."""
        self._send(kind, flags | NLM_F_ACK, content)
        for _ in self._answers(what):
            pass

    def _send(self, kind: int, flags: int, content: bytes) -> None:
        self._sequence += 1
        header = HEADER.pack(HEADER.size + len(content), kind, flags | NLM_F_REQUEST, self._sequence, 0)
        self._socket.send(header + content)

    def _answers(self, what: str = "dump") -> Iterator[bytes]:
        """Raw messages, up to the end of the answer."""
        while True:
            data = self._socket.recv(RECEIVE_SIZE)
            while len(data) >= HEADER.size:
                length, kind, _, sequence, _ = HEADER.unpack_from(data)
                if sequence == self._sequence and kind in (NLMSG_DONE, NLMSG_ERROR):
                    code = ERROR.unpack_from(data, HEADER.size)[0] if kind == NLMSG_ERROR else 0
                    if code:
                        raise libc.error(-code, f"netlink ({what})")
                    return
                if sequence == self._sequence:
                    yield data[:length]
                data = data[max(-(-length // 4) * 4, HEADER.size) :]

    # Devices.

    def links(self) -> list[Link]:
        """All devices, by index."""
        return sorted(_link(message) for message in self.dump(LINK))

    def make_link(self, link: Link, data: bytes = b"") -> None:
        """A new device with index, name, MTU and address; `data`: what its kind of driver wants."""
        info = string(IFLA_INFO_KIND, link.kind) + (nested(IFLA_INFO_DATA, data) if data else b"")
        content = _described(link) + nested(IFLA_LINKINFO, info)
        self.request(LINK, NLM_F_CREATE | NLM_F_EXCL, content, f"make {link.name}")

    def make_pair(self, link: Link, other: Link, namespace: int = -1) -> None:
        """Two devices of the kind veth; the other one in the namespace of a descriptor, or here."""
        away = u32(IFLA_NET_NS_FD, namespace) if namespace >= 0 else b""
        self.make_link(link, nested(VETH_INFO_PEER, _described(other) + away))

    def change_link(self, link: Link, *, master: int | None = None) -> None:
        """Give a device its flags and MTU; with `master` make it a part of that device, 0 for none."""
        content = LINK_MESSAGE.pack(0, 0, link.number, link.flags & CHANGEABLE, CHANGEABLE) + u32(IFLA_MTU, link.mtu)
        content += u32(IFLA_MASTER, master) if master is not None else b""
        self.request(LINK, 0, content, f"change {link.name}")

    def index_of(self, name: str) -> int | None:
        """The number of a device; None where there is none of that name."""
        return next((link.number for link in self.links() if link.name == name), None)


def _described(link: Link) -> bytes:
    content = LINK_MESSAGE.pack(0, 0, link.number, 0, 0)
    content += string(IFLA_IFNAME, link.name) if link.name else b""
    content += u32(IFLA_MTU, link.mtu) if link.mtu else b""
    return content + (attribute(IFLA_ADDRESS, link.address) if link.address else b"")


def _link(message: Message) -> Link:
    _, hardware, index, flags, _ = LINK_MESSAGE.unpack(message.body)
    found = message.attributes
    info = attributes(found.get(IFLA_LINKINFO, b""))

    def number(kind: int, default: int) -> int:
        return struct.unpack("=i", found[kind])[0] if kind in found else default

    return Link(
        index, found[IFLA_IFNAME].rstrip(b"\0").decode(errors="surrogateescape"), flags, number(IFLA_MTU, 0),
        found.get(IFLA_ADDRESS, b""), info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode(),
        hardware == ARPHRD_LOOPBACK, number(IFLA_MASTER, 0), number(IFLA_LINK, 0), number(IFLA_LINK_NETNSID, -1),
    )  # fmt: skip
