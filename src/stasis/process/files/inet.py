# SPDX-License-Identifier: Apache-2.0
"""Sockets of IPv4 and IPv6: UDP, raw ones, and TCP that listens, is connected (`tcp.py`) or not. Datagrams that nobody
read are kept where they can be sent again (`datagrams.py`), else they are lost, as by the network, and told of."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from typing import TYPE_CHECKING

from stasis.errors import BusyError, StateError
from stasis.linux import process
from stasis.process import spaces
from stasis.process.files import datagrams, tcp
from stasis.process.files.connections import why_no_lock
from stasis.process.files.descriptor import duplicate, owner, set_flags
from stasis.process.files.kind import FileKind
from stasis.process.files.sockopts import options_of, set_options
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.sockets import InetSkEntry, IpOptsEntry, SkShutdown, TcpOptsEntry, TcpStreamEntry

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.kind import Looking, Opened, Saving
    from stasis.process.files.options import FileOptions
    from stasis.process.images.imageset import ImageSet

__all__ = ["InetSockets", "ends_of", "is_connection", "let_live"]

FAMILIES = (socket.AF_INET, socket.AF_INET6)
# include/net/tcp_states.h
TCP_ESTABLISHED, TCP_CLOSE, TCP_LISTEN = 1, 7, 10
TCP_INFO = struct.Struct("<8B 4I 2I")
"""The beginning of struct tcp_info; unacked and sacked are a listener's waiting connections and their limit."""
IP_FREEBIND = 15
FIONREAD = 0x541B  # include/uapi/asm-generic/ioctls.h
TCP_ULP = 31
IPPROTO_UDPLITE, HIGHEST_PROTOCOL = 136, 255
TCP = (socket.SOCK_STREAM, socket.IPPROTO_TCP)
KNOWN = {
    TCP, (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    (socket.SOCK_DGRAM, IPPROTO_UDPLITE), (socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
    (socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6), *((socket.SOCK_RAW, number) for number in range(HIGHEST_PROTOCOL + 1)),
}  # fmt: skip
"""Types and protocols."""
PASSING = ("connections wait in it that were not accepted", "the connection is being made")
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
            reason, option = _reason_against(sock, self.options)
            if reason:
                looking.findings.add(descriptor.pid, descriptor.where, reason, option, passes=reason in PASSING)

    def check_apart(self, descriptor: Descriptor, namespace: int, looking: Looking) -> None:
        """The lock that drops packets is in the namespace of the first process."""
        if self.options.tcp == "established" and spaces.is_apart("net", namespace) and _is_connected(descriptor):
            reason = "it is a TCP connection in another network namespace than that of the tree's first process"
            looking.findings.add(descriptor.pid, descriptor.where, reason, "--tcp close")

    def check_all(self, looking: Looking) -> None:
        """A connection that others have open, too, would be dead for them once the tree has ended."""
        if self.options.tcp != "established":
            return
        found = [one for one in looking.descriptors if self.claims(one) and _is_connected(one)]
        inodes = {one.status.st_ino: one for one in found}
        tree = {one.pid for one in looking.descriptors} | {os.getpid()}
        for pid in process.processes() if inodes else ():
            for link in _links(pid) if pid not in tree else ():
                kind, _, inode = link.partition(":[")
                if kind == "socket" and (one := inodes.get(int(inode[:-1]))) is not None:
                    reason = f"process {pid} ({process.name(pid)}), which is outside of the tree, has it open as well"
                    looking.findings.add(one.pid, one.where, reason, "--tcp close")

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        with _opened(descriptor) as sock:
            entry = _describe(sock, descriptor, number, fd)
            if (entry.type, entry.proto) == TCP:
                entry.tcp_opts = _tcp_options(sock)
                if entry.state in tcp.CONNECTED and self.options.tcp == "established":
                    _dump_connection(sock, descriptor, entry, saving)
                elif tcp.has_ended(sock):
                    _dump_end(sock, entry, saving)
            elif datagrams.is_waiting(sock):
                if reason := datagrams.why_not_kept(sock):
                    told = "datagrams that came and were not read yet will be gone, as"
                    saving.warnings.append(f"process {descriptor.pid}: {descriptor.where}: {told} {reason}")
                else:
                    datagrams.keep(sock, number, saving)
        return FileEntry(type=FdTypes.INETSK, id=number, isk=entry)

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        return f"socket:[{self.message_of(entry).ino}]"

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: InetSkEntry = self.message_of(entry)
        if found.family not in FAMILIES or (found.type, found.proto) not in KNOWN:
            raise damaged(opened.images.file_path("files"), 0, f"socket {found.id} is of an unknown kind")
        with socket.socket(found.family, found.type, found.proto) as sock:
            if is_connection(found) and not opened.closes_connections:
                _make_connection(sock, found, opened)
            else:
                has_ended = found.state == TCP_CLOSE and opened.images.has("tcp-stream", found.ino)
                _make(sock, found, bound=not has_ended)
                if has_ended:
                    tcp.end(sock, _stream_of(found, opened.images)[1])
                    set_options(sock, found.opts)
            set_flags(sock.fileno(), found.flags)
            opened.state.setdefault(InetSockets, {})[entry.id] = found
            return os.dup(sock.fileno())

    def connect(self, opened: Opened) -> None:
        """All sockets have their addresses."""
        datagrams.put_back(opened.state.get(InetSockets, {}), opened)

    def done(self, opened: Opened) -> None:
        """Connections that are on their way from one process to another live now: no one has them to be let go."""
        held = {entry.id for table in opened.tables.values() for entry in table}
        for number in opened.numbers(FdTypes.INETSK):
            found = self.message_of(opened.entry(number))
            if number not in held and is_connection(found) and not opened.closes_connections:
                with socket.socket(fileno=os.dup(opened.open(number))) as sock:
                    let_live(sock, found, opened.images)


def _is_waiting(sock: socket.socket) -> bool:
    """Whether there is a datagram to be read; images have no place for where it came from. To peek would take away an
    error that waits there."""
    return any(fcntl.ioctl(sock, FIONREAD, bytes(4)))


def is_connection(found: InetSkEntry) -> bool:
    """Whether it is a TCP connection, of which there is a stream in the images."""
    return (found.type, found.proto) == TCP and found.state in tcp.CONNECTED


def let_live(sock: socket.socket, found: InetSkEntry, images: ImageSet) -> None:
    """End the repair of a restored connection, and send what the dumped one had not sent yet."""
    entry, _, outgoing = _stream_of(found, images)
    tcp.end_repair(sock, reuse=bool(found.opts.reuseaddr))
    tcp.send_rest(sock, found.state, outgoing[len(outgoing) - (entry.unsq_len or 0) :])
    set_options(sock, found.opts)


def _dump_connection(sock: socket.socket, descriptor: Descriptor, entry: InetSkEntry, saving: Saving) -> None:
    saving.connections.hold(descriptor, sock, ends_of(entry), reuse=bool(entry.opts.reuseaddr))
    entry.state = tcp.state_of(sock)  # nothing changes it any more
    stream, incoming, outgoing = tcp.read_stream(sock)
    saving.out.image("tcp-stream", entry.ino).append(stream, incoming, outgoing)


def _dump_end(sock: socket.socket, entry: InetSkEntry, saving: Saving) -> None:
    """What was left to read when a connection ended. It is repaired for no longer than it takes to look."""
    tcp.begin_repair(sock)
    try:
        stream, incoming, _ = tcp.read_stream(sock)
    finally:
        tcp.end_repair(sock, reuse=bool(entry.opts.reuseaddr))
    stream.outq_len = 0
    saving.out.image("tcp-stream", entry.ino).append(stream, incoming, b"")


def ends_of(entry: InetSkEntry) -> tuple[str, int, str, int]:
    return (_address(entry.family, entry.src_addr), entry.src_port, _address(entry.family, entry.dst_addr),
            entry.dst_port)  # fmt: skip


def _stream_of(found: InetSkEntry, images: ImageSet) -> tuple[TcpStreamEntry, bytes, bytes]:
    with images.image("tcp-stream", found.ino) as image:
        for record in image:
            entry = record.message
            if not isinstance(entry, TcpStreamEntry) or (entry.unsq_len or 0) > entry.outq_len:
                raise damaged(images.file_path("tcp-stream", found.ino), record.offset, "more is unsent than there is")
            return entry, image.read(record.parts[0]), image.read(record.parts[1])
    raise damaged(images.file_path("tcp-stream", found.ino), 0, "it has no connection")


def _make_connection(sock: socket.socket, found: InetSkEntry, opened: Opened) -> None:
    """In repair mode, until all processes are there."""
    entry, *queues = _stream_of(found, opened.images)
    set_options(sock, found.opts)
    if found.v6only is not None:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(found.v6only))
    own, own_port, peer, peer_port = ends_of(found)
    try:
        tcp.begin_repair(sock)
        tcp.connect(sock, found.state, entry, (queues[0], queues[1]), (own, own_port), (peer, peer_port),
                    (_target(found, own, own_port), _target(found, peer, peer_port)))  # fmt: skip
    except OSError as error:
        raise StateError(
            f"the TCP connection from {own} port {own_port} to {peer} port {peer_port} cannot be made again: "
            f"{error.strerror}", errno=error.errno or 0,
            hint="restore where that address is, as root, and once; or --tcp close",
        ) from error  # fmt: skip
    _set_protocol_options(sock, found)
    if found.shutdown in (SkShutdown.READ, SkShutdown.BOTH):
        sock.shutdown(socket.SHUT_RD)


def _opened(descriptor: Descriptor) -> socket.socket:
    return socket.socket(fileno=duplicate(descriptor))


def _is_connected(descriptor: Descriptor) -> bool:
    with _opened(descriptor) as sock:
        return (sock.type, sock.proto) == TCP and tcp.state_of(sock) in tcp.CONNECTED


def _links(pid: int) -> list[str]:
    """What the descriptors of a process are; those that go meanwhile are left out."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def _reason_against(sock: socket.socket, options: FileOptions) -> tuple[str, str]:
    """Why it cannot be kept, and the option that gets around it."""
    if (sock.type, sock.proto) not in KNOWN:
        return f"internet sockets of the protocol {sock.proto} are not supported yet", ""
    if sock.type != socket.SOCK_STREAM:
        return "", ""
    state, waiting, _ = _state(sock)
    if state == TCP_LISTEN:
        return (PASSING[0], "--skip-in-flight") if (
            waiting and not options.skip_in_flight) else ("", "")  # fmt: skip
    return ("", "") if state == TCP_CLOSE or options.tcp == "close" else _against_connection(sock, state, options)


def _against_connection(sock: socket.socket, state: int, options: FileOptions) -> tuple[str, str]:
    if not options.tcp:
        return "it is a TCP connection", "--tcp established or --tcp close"
    if state not in tcp.CONNECTED:
        return PASSING[1], "--tcp close"
    if sock.getsockopt(socket.IPPROTO_TCP, TCP_ULP, 16).rstrip(b"\0"):
        return "the kernel encrypts this connection (kTLS)", "--tcp close"
    return why_no_lock(options.network_lock)


def _describe(sock: socket.socket, descriptor: Descriptor, number: int, fd: int) -> InetSkEntry:
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
        entry.ifname = socket.if_indextoname(own[3]) if own[3] else None  # of a link-local address
    if sock.type == socket.SOCK_RAW and entry.ip_opts is not None:
        from stasis.process.files.rawsock import options_of_raw, peer_words

        entry.ip_opts.raw = options_of_raw(sock)
        entry.dst_addr = peer_words(family, descriptor.status.st_ino) or entry.dst_addr
    if is_connection(entry) and tcp.is_read_shut(sock):
        entry.shutdown = SkShutdown.READ
    return entry


def _state(sock: socket.socket) -> tuple[int, int, int]:
    """(state, waiting connections, backlog)"""
    if (sock.type, sock.proto) == TCP:
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


def _make(sock: socket.socket, found: InetSkEntry, *, bound: bool) -> None:
    """Bound, listening or connected as it was. A TCP connection that is not to be kept is in no state."""
    set_options(sock, found.opts)
    if found.v6only is not None and found.type != socket.SOCK_RAW:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(found.v6only))
    _set_protocol_options(sock, found)
    if found.ip_opts is not None and found.ip_opts.raw is not None and found.type == socket.SOCK_RAW:
        from stasis.process.files.rawsock import set_raw_options

        set_raw_options(sock, found.ip_opts.raw)
    if (found.type, found.proto) == TCP and found.state not in (TCP_LISTEN, TCP_CLOSE):
        return
    if found.src_port and bound:
        _bind(sock, _address(found.family, found.src_addr), found)
    if found.state == TCP_LISTEN:
        sock.listen(found.backlog)
    elif found.type != socket.SOCK_STREAM and (found.dst_port or any(found.dst_addr)):
        sock.connect(_target(found, _address(found.family, found.dst_addr), found.dst_port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(found.opts.reuseaddr or False))


def _target(found: InetSkEntry, address: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """A socket address; link-local ones count on an interface only."""
    if found.family == socket.AF_INET:
        return address, port
    is_local = address.startswith("fe80") and found.ifname
    return address, port, 0, socket.if_nametoindex(found.ifname or "") if is_local else 0


def _bind(sock: socket.socket, address: str, found: InetSkEntry) -> None:
    """What is left of connections that the dumped process had must not stand in the way, nor those that are back."""
    if found.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(_target(found, address, found.src_port))
    except OSError as error:
        raise BusyError(f"port {found.src_port} of {address}, which a process had, cannot be had: {error.strerror}",
                        hint="end what uses it, or restore where it is free", errno=error.errno or 0) from error


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
