# SPDX-License-Identifier: Apache-2.0
"""Sockets of IPv4 and IPv6: UDP, and TCP that listens or is not connected. Datagrams that nobody read are lost, as
the network may lose them."""

from __future__ import annotations

import os
import socket
import stat
import struct

from stasis.errors import BusyError, StateError
from stasis.process.files.descriptor import Descriptor, duplicate, owner, set_flags
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.files.sockopts import options_of, set_options
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.sockets import InetSkEntry, IpOptsEntry, TcpOptsEntry

__all__ = ["InetSockets"]

FAMILIES = (socket.AF_INET, socket.AF_INET6)
# include/net/tcp_states.h
TCP_ESTABLISHED, TCP_CLOSE, TCP_LISTEN = 1, 7, 10
TCP_INFO = struct.Struct("<8B 4I 2I")
"""The beginning of struct tcp_info; unacked and sacked are a listener's waiting connections and their limit."""
IP_FREEBIND = 15
KNOWN = ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP))
WORDS: dict[int, str] = {socket.AF_INET: "<I", socket.AF_INET6: "<4I"}


class InetSockets(FileKind):
    type = FdTypes.INETSK
    field = "isk"

    def claims(self, descriptor: Descriptor) -> bool:
        if descriptor.kind != stat.S_IFSOCK:
            return False
        with _opened(descriptor) as sock:
            return sock.family in FAMILIES

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        with _opened(descriptor) as sock:
            if reason := _reason_against(sock):
                looking.findings.add(descriptor.pid, descriptor.where, reason)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        with _opened(descriptor) as sock:
            state, _, backlog = _state(sock)
            family, own, peer = sock.family, sock.getsockname(), _peer(sock)
            entry = InetSkEntry(
                id=number, ino=descriptor.status.st_ino & 0xFFFFFFFF, family=family, type=sock.type, proto=sock.proto,
                state=state, src_port=own[1], dst_port=peer[1] if peer else 0, flags=descriptor.flags,
                backlog=backlog, src_addr=_words(family, own[0]), dst_addr=_words(family, peer[0] if peer else ""),
                fown=owner(fd), opts=options_of(sock), ip_opts=_ip_options(sock),
            )  # fmt: skip
            if family == socket.AF_INET6:
                entry.v6only = bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
            if sock.proto == socket.IPPROTO_TCP:
                entry.tcp_opts = _tcp_options(sock)
        return FileEntry(type=FdTypes.INETSK, id=number, isk=entry)

    def resource(self, entry: FileEntry) -> str:
        return f"socket:[{self.message_of(entry).ino}]"

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: InetSkEntry = self.message_of(entry)
        if found.family not in FAMILIES or (found.type, found.proto) not in KNOWN:
            raise damaged(opened.images.file_path("files"), 0, f"socket {found.id} is of an unknown kind")
        if found.type == socket.SOCK_STREAM and found.state not in (TCP_LISTEN, TCP_CLOSE):
            raise StateError(f"the images have a TCP connection (socket:[{found.ino}]), which cannot be restored yet",
                             hint=f"give a descriptor for it: --inherit-fd fd[N]:socket:[{found.ino}]")  # fmt: skip
        with socket.socket(found.family, found.type, found.proto) as sock:
            _make(sock, found)
            set_flags(sock.fileno(), found.flags)
            return os.dup(sock.fileno())


def _opened(descriptor: Descriptor) -> socket.socket:
    return socket.socket(fileno=duplicate(descriptor))


def _reason_against(sock: socket.socket) -> str:
    if (sock.type, sock.proto) not in KNOWN:
        return f"internet sockets of the protocol {sock.proto} are not supported yet"
    state, waiting, _ = _state(sock)
    if sock.proto == socket.IPPROTO_UDP:
        return ""
    if state not in (TCP_LISTEN, TCP_CLOSE):
        return "TCP connections are not supported yet"
    return "connections wait in it that were not accepted" if state == TCP_LISTEN and waiting else ""


def _state(sock: socket.socket) -> tuple[int, int, int]:
    """(state, waiting connections, backlog)"""
    if sock.proto == socket.IPPROTO_TCP:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
        fields = TCP_INFO.unpack(raw)
        return fields[0], *(fields[12:14] if fields[0] == TCP_LISTEN else (0, 0))
    return TCP_ESTABLISHED if _peer(sock) else TCP_CLOSE, 0, 0


def _peer(sock: socket.socket) -> tuple[str, int] | None:
    try:
        found = sock.getpeername()
    except OSError:
        return None  # not connected
    return found[0], found[1]


def _words(family: int, address: str) -> list[int]:
    """As the image has it: the address's bytes as words of this machine."""
    raw = socket.inet_pton(family, address.partition("%")[0]) if address else bytes(struct.calcsize(WORDS[family]))
    return list(struct.unpack(WORDS[family], raw))


def _address(family: int, words: list[int]) -> str:
    return socket.inet_ntop(family, struct.pack(WORDS[family], *words))


def _ip_options(sock: socket.socket) -> IpOptsEntry:
    if sock.family == socket.AF_INET6:
        return IpOptsEntry()
    return IpOptsEntry(
        freebind=bool(sock.getsockopt(socket.IPPROTO_IP, IP_FREEBIND)) or None,
        tos=sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS), ttl=sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL),
    )  # fmt: skip


def _tcp_options(sock: socket.socket) -> TcpOptsEntry:
    def get(name: int) -> int:
        return sock.getsockopt(socket.IPPROTO_TCP, name)

    return TcpOptsEntry(
        cork=bool(get(socket.TCP_CORK)), nodelay=bool(get(socket.TCP_NODELAY)), keepcnt=get(socket.TCP_KEEPCNT),
        keepidle=get(socket.TCP_KEEPIDLE), keepintvl=get(socket.TCP_KEEPINTVL),
    )  # fmt: skip


def _make(sock: socket.socket, found: InetSkEntry) -> None:
    """Bound, listening or connected as it was."""
    set_options(sock, found.opts)
    if found.v6only is not None:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(found.v6only))
    _set_protocol_options(sock, found)
    if found.src_port:
        _bind(sock, _address(found.family, found.src_addr), found)
    if found.state == TCP_LISTEN:
        sock.listen(found.backlog)
    elif found.dst_port and found.type == socket.SOCK_DGRAM:
        sock.connect((_address(found.family, found.dst_addr), found.dst_port))


def _bind(sock: socket.socket, address: str, found: InetSkEntry) -> None:
    """What is left of connections that the dumped process had must not stand in the way."""
    if found.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, found.src_port))
    except OSError as error:
        raise BusyError(f"port {found.src_port} of {address}, which a process had, cannot be had: {error.strerror}",
                        hint="end what uses it, or restore where it is free", errno=error.errno or 0) from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(found.opts.reuseaddr or False))


def _set_protocol_options(sock: socket.socket, found: InetSkEntry) -> None:
    tcp, ip = found.tcp_opts, found.ip_opts
    wanted = []
    if tcp is not None:
        wanted = [(socket.IPPROTO_TCP, socket.TCP_CORK, tcp.cork),
                  (socket.IPPROTO_TCP, socket.TCP_NODELAY, tcp.nodelay),
                  (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, tcp.keepcnt),
                  (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, tcp.keepidle),
                  (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, tcp.keepintvl)]  # fmt: skip
    if ip is not None and sock.family == socket.AF_INET:
        wanted += [(socket.IPPROTO_IP, IP_FREEBIND, ip.freebind), (socket.IPPROTO_IP, socket.IP_TOS, ip.tos),
                   (socket.IPPROTO_IP, socket.IP_TTL, ip.ttl)]  # fmt: skip
    for level, name, value in wanted:
        if value is not None:
            sock.setsockopt(level, name, int(value))
