# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of sockets by their inode numbers (sock_diag(7), include/uapi/linux/unix_diag.h)."""

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from stasis.linux import libc
from stasis.linux.netlink import attributes

__all__ = ["TCP_LISTEN", "PacketSocket", "UnixSocket", "packet_sockets", "unix_sockets"]

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
HEADER = struct.Struct("=IHHII")
UNIX_REQUEST = struct.Struct("=BBHIIIII")
UNIX_MESSAGE = struct.Struct("=BBBBIII")
ALL = 0xFFFFFFFF
# include/uapi/linux/unix_diag.h
UDIAG_SHOW_ALL = 0x5F
UNIX_DIAG_NAME, UNIX_DIAG_VFS, UNIX_DIAG_PEER, UNIX_DIAG_RQLEN, UNIX_DIAG_SHUTDOWN = 0, 1, 2, 4, 6
# include/uapi/linux/packet_diag.h
PACKET_REQUEST = struct.Struct("=BBHIIII")
PACKET_MESSAGE = struct.Struct("=BBHIII")
PACKET_INFO = struct.Struct("=6I")
PACKET_GROUP = struct.Struct("=IIHH32s")
PACKET_SHOW = 0xF  # PACKET_SHOW_INFO, _MCLIST, _RING_CFG, _FANOUT
PACKET_DIAG_INFO, PACKET_DIAG_MCLIST, PACKET_DIAG_RX_RING, PACKET_DIAG_TX_RING, PACKET_DIAG_FANOUT = range(5)
TCP_LISTEN = 10
RECEIVE_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A unix socket. `state` as a TCP state; `file` is the (device as stat tells it, inode) that it is bound to;
    `shutdown`: 1 for reading, 2 for writing; `waiting`: bytes to read, or connections to accept."""

    inode: int
    type: int
    state: int
    name: bytes
    file: tuple[int, int] | None
    peer: int
    waiting: int
    backlog: int
    shutdown: int


def unix_sockets() -> dict[int, UnixSocket]:
    """All unix sockets of our network namespace, by inode."""
    request = UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, ALL, 0, UDIAG_SHOW_ALL, ALL, ALL)
    found = {}
    for message in _dump(request):
        _, kind, state, _, inode, _, _ = UNIX_MESSAGE.unpack_from(message)
        known = attributes(message[UNIX_MESSAGE.size :])
        waiting, backlog = struct.unpack("=II", known.get(UNIX_DIAG_RQLEN, bytes(8)))
        found[inode] = UnixSocket(
            inode, kind, state, known.get(UNIX_DIAG_NAME, b""), _file(known.get(UNIX_DIAG_VFS)),
            int.from_bytes(known.get(UNIX_DIAG_PEER, b""), "little"), waiting, backlog,
            int.from_bytes(known.get(UNIX_DIAG_SHUTDOWN, b""), "little"),
        )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class PacketSocket:
    """A packet socket. `groups`: (interface, kind, address) of each that it has joined; `flags`: PDI_*."""

    inode: int
    type: int
    protocol: int
    interface: int
    version: int
    reserve: int
    copy_threshold: int
    timestamp: int
    flags: int
    groups: tuple[tuple[int, int, bytes], ...]
    has_ring: bool
    fanout: int | None


def packet_sockets() -> dict[int, PacketSocket]:
    """All packet sockets of our network namespace, by inode. ENOENT where the kernel does not tell."""
    request = PACKET_REQUEST.pack(socket.AF_PACKET, 0, 0, 0, PACKET_SHOW, ALL, ALL)
    found = {}
    for message in _dump(request):
        _, kind, protocol, inode, _, _ = PACKET_MESSAGE.unpack_from(message)
        known = attributes(message[PACKET_MESSAGE.size :])
        fanout = known.get(PACKET_DIAG_FANOUT)
        groups = tuple((index, kind, address[:length]) for index, _, kind, length, address
                       in PACKET_GROUP.iter_unpack(known.get(PACKET_DIAG_MCLIST, b"")))  # fmt: skip
        interface, version, reserve, threshold, timestamp, flags = PACKET_INFO.unpack(known[PACKET_DIAG_INFO])
        found[inode] = PacketSocket(
            inode, kind, protocol, interface, version, reserve, threshold, timestamp, flags, groups,
            PACKET_DIAG_RX_RING in known or PACKET_DIAG_TX_RING in known,
            None if fanout is None else int.from_bytes(fanout, "little"),
        )  # fmt: skip
    return found


def _file(raw: bytes | None) -> tuple[int, int] | None:
    if raw is None:
        return None
    inode, device = struct.unpack("=II", raw)
    return os.makedev(device >> 20, device & 0xFFFFF), inode


def _dump(request: bytes) -> Iterator[bytes]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as sock:
        sock.send(HEADER.pack(HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0) + request)
        while True:
            data = sock.recv(RECEIVE_SIZE)
            while data:
                length, kind, *_ = HEADER.unpack_from(data)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    raise libc.error(-struct.unpack_from("=i", data, HEADER.size)[0], "sock_diag")
                yield data[HEADER.size : length]
                data = data[(length + 3) & ~3 :]
