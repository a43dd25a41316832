# SPDX-License-Identifier: Apache-2.0
"""TCP connections through repair mode (TCP_REPAIR, tcp(7)): taken out of a socket with what is queued in both
directions, and put into a new one, without the other end noticing.

A socket in repair mode sends nothing, and ends without a word when it is closed. What still comes in would be
acknowledged: the network lock keeps it away from before the queues are read until the connection is back.
"""

from __future__ import annotations

import array
import errno
import fcntl
import select
import socket
import struct

from stasis.process.images.schema.sockets import TcpStreamEntry

__all__ = [
    "CONNECTED", "begin_repair", "connect", "end", "end_repair", "has_ended", "is_read_shut", "read_stream",
    "send_rest", "state_of",
]  # fmt: skip

# include/net/tcp_states.h
ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 2, 4, 5, 7, 8, 9, 10, 11
CONNECTED = frozenset((ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING))
"""The states that can be kept."""
WE_ENDED = frozenset((FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING))
THEY_ENDED = frozenset((CLOSE_WAIT, LAST_ACK, CLOSING))
# include/uapi/linux/tcp.h
TCP_MAXSEG, TCP_INFO, TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 2, 11, 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 24, 29
REPAIR_ON, REPAIR_OFF = 1, 0
NO_QUEUE, RECEIVE_QUEUE, SEND_QUEUE = 0, 1, 2
OPTION_MSS, OPTION_WINDOW, OPTION_SACK, OPTION_TIMESTAMP = 2, 3, 4, 8
HAS_TIMESTAMPS, HAS_SACK, HAS_SCALE = 1, 2, 4  # TCPI_OPT_*
INFO = struct.Struct("=6B2B")
WINDOW = struct.Struct("=5I")  # struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
OPTION = struct.Struct("=II")
SIOCINQ, SIOCOUTQ, SIOCOUTQNSD = 0x541B, 0x5411, 0x894B  # include/uapi/linux/sockios.h
SO_PEEK_OFF, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 42, 32, 33
LARGEST_BUFFER = (1 << 30) - 1
PORTION = 16 << 10
"""The kernel wants each portion of a queue in one piece."""
MASK = 0xFFFFFFFF
NOBODYS_PORT = 1


def state_of(sock: socket.socket) -> int:
    """TCP_ESTABLISHED and so on."""
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 1)[0]


def is_read_shut(sock: socket.socket) -> bool:
    """Whether the process itself ended reading, and not the other end."""
    return state_of(sock) not in THEY_ENDED and _is_at_end(sock)


def has_ended(sock: socket.socket) -> bool:
    """Whether a socket without a connection had one, that came to its end and may have left something to read."""
    return state_of(sock) == CLOSE and _is_at_end(sock)


def _is_at_end(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    return any(events & select.POLLRDHUP for _, events in poller.poll(0))


def begin_repair(sock: socket.socket) -> None:
    """EPERM without CAP_NET_ADMIN."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)


def end_repair(sock: socket.socket, *, reuse: bool) -> None:
    """Let the connection live again; a window probe tells the other end, which may have waited. `reuse`: its
    SO_REUSEADDR, which the kernel switches off with the mode."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))


def read_stream(sock: socket.socket) -> tuple[TcpStreamEntry, bytes, bytes]:
    """The connection of a socket in repair mode, what was not read yet and what was not acknowledged yet."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, INFO.size)
    state, _, _, _, _, options, scales, _ = INFO.unpack(raw)
    incoming, outgoing, unsent = (_length(sock, request) for request in (SIOCINQ, SIOCOUTQ, SIOCOUTQNSD))
    if state in WE_ENDED:  # a FIN that was not acknowledged counts as a byte
        outgoing, unsent = max(outgoing - 1, 0), max(unsent - 1, 0)
    window = WINDOW.unpack(sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, WINDOW.size))
    in_seq, in_data = _read_queue(sock, RECEIVE_QUEUE, incoming)
    out_seq, out_data = _read_queue(sock, SEND_QUEUE, outgoing)
    entry = TcpStreamEntry(
        inq_len=incoming, inq_seq=in_seq, outq_len=outgoing, outq_seq=out_seq, opt_mask=options,
        snd_wscale=scales & 0xF if options & HAS_SCALE else 0,
        rcv_wscale=scales >> 4 if options & HAS_SCALE else 0,
        mss_clamp=sock.getsockopt(socket.IPPROTO_TCP, TCP_MAXSEG),
        timestamp=sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & MASK if options & HAS_TIMESTAMPS else None,
        cork=bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK)),
        nodelay=bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)),
        unsq_len=unsent, snd_wl1=window[0], snd_wnd=window[1], max_window=window[2], rcv_wnd=window[3],
        rcv_wup=window[4],
    )  # fmt: skip
    return entry, in_data, out_data


def _length(sock: socket.socket, request: int) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(sock, request, value)
    return value[0]


def _choose(sock: socket.socket, queue: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)


def _read_queue(sock: socket.socket, queue: int, length: int) -> tuple[int, bytes]:
    """(sequence number of its end, contents)"""
    _choose(sock, queue)
    sequence = sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & MASK
    data = b""
    if length:
        peek_offset = _peek_offset(sock)
        if peek_offset >= 0:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        data = sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if peek_offset >= 0:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, peek_offset)
    _choose(sock, NO_QUEUE)
    if len(data) != length:
        raise OSError(0, f"a TCP queue gave {len(data)} of {length} bytes")
    return sequence, data


def _peek_offset(sock: socket.socket) -> int:
    """Where looking at the queue would begin; TCP has that since Linux 6.10 (commit 05ea491641d3)."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return -1


class _Stream:
    """A connection that is put into a socket in repair mode; `own` and `peer` are its ends."""

    def __init__(self, sock: socket.socket, state: int, entry: TcpStreamEntry, own: tuple[str, int],
                 peer: tuple[str, int]) -> None:  # fmt: skip
        self.sock, self.state, self.entry = sock, state, entry
        self.own, self.peer = own, peer
        self.we_ended, self.they_ended = int(state in WE_ENDED), int(state in THEY_ENDED)
        self.in_end = entry.inq_seq - self.they_ended
        self.out_end = entry.outq_seq - self.we_ended

    def set_sequences(self) -> None:
        """Before it is connected."""
        for queue, end, length in ((RECEIVE_QUEUE, self.in_end, self.entry.inq_len),
                                   (SEND_QUEUE, self.out_end, self.entry.outq_len)):  # fmt: skip
            _choose(self.sock, queue)
            value = end - length & MASK
            self.sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("=I", value))

    def set_options(self) -> None:
        """What both ends agreed on when the connection was made."""
        entry, options = self.entry, [(OPTION_MSS, self.entry.mss_clamp)]
        if entry.opt_mask & HAS_SCALE:
            options.append((OPTION_WINDOW, (entry.snd_wscale & 0xF) | ((entry.rcv_wscale or 0) & 0xF) << 16))
        if entry.opt_mask & HAS_SACK:
            options.append((OPTION_SACK, 0))
        if entry.opt_mask & HAS_TIMESTAMPS:
            options.append((OPTION_TIMESTAMP, 0))
        packed = b"".join(OPTION.pack(*option) for option in options)
        self.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, packed)
        if entry.timestamp is not None:
            self.sock.setsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, struct.pack("=I", entry.timestamp))

    def fill(self, incoming: bytes, sent: bytes) -> None:
        """What was received and not read, and what was sent and not acknowledged."""
        for queue, data in ((RECEIVE_QUEUE, incoming), (SEND_QUEUE, sent)):
            _choose(self.sock, queue)
            for at in range(0, len(data), PORTION):
                self.sock.sendall(data[at : at + PORTION])

    def end_directions(self, *, rest: bool) -> None:
        """Where one end or both have said that they will send no more. With a `rest` to send ours comes behind it."""
        from stasis.process.files.segments import ACK, FIN, send_segment  # paid for only where it is used

        unacknowledged = self.out_end - self.entry.outq_len
        ours_first = self.state == CLOSING
        if self.they_ended and not ours_first:
            send_segment(self.peer, self.own, self.in_end, unacknowledged, FIN | ACK, self._window())
        if self.we_ended and not rest:
            _choose(self.sock, SEND_QUEUE)
            self.sock.shutdown(socket.SHUT_WR)
        if self.they_ended and ours_first:
            send_segment(self.peer, self.own, self.in_end, unacknowledged, FIN | ACK, self._window())
        if self.state == FIN_WAIT2:
            self.acknowledge_end()

    def acknowledge_end(self) -> None:
        """The other end has heard that no more comes."""
        from stasis.process.files.segments import ACK, send_segment

        send_segment(self.peer, self.own, self.in_end + self.they_ended, self.out_end + 1, ACK, self._window())

    def _window(self) -> int:
        scale = self.entry.snd_wscale if self.entry.opt_mask & HAS_SCALE else 0
        return (self.entry.snd_wnd or 0) >> scale

    def set_window(self) -> None:
        entry = self.entry
        if entry.snd_wnd is not None:
            fields = (entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup)
            packed = WINDOW.pack(*(field or 0 for field in fields))
            self.sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, packed)


def connect(
    sock: socket.socket, state: int, entry: TcpStreamEntry, queues: tuple[bytes, bytes], own: tuple[str, int],
    peer: tuple[str, int], bind_and_connect: tuple[object, object],
) -> None:  # fmt: skip
    """Make `sock`, which is in repair mode and in no state yet, that end of a connection. It stays in repair mode;
    what was never sent is sent by `send_rest`. `bind_and_connect`: both ends as socket addresses."""
    stream = _Stream(sock, state, entry, own, peer)
    stream.set_sequences()
    for force in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, force, LARGEST_BUFFER)
    sock.bind(bind_and_connect[0])  # type: ignore[arg-type]
    sock.connect(bind_and_connect[1])  # type: ignore[arg-type]
    stream.set_options()
    unsent = entry.unsq_len or 0
    incoming, outgoing = queues
    stream.fill(incoming, outgoing[: len(outgoing) - unsent])
    if state != ESTABLISHED:
        stream.end_directions(rest=bool(unsent))
    stream.set_window()
    _choose(sock, NO_QUEUE)


def send_rest(sock: socket.socket, state: int, data: bytes) -> None:
    """Send what was never sent, out of repair mode; and that no more follows, where that was said."""
    if data:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, LARGEST_BUFFER)
        at = 0
        while at < len(data):
            at += sock.send(data[at:], socket.MSG_DONTWAIT)
        if state in WE_ENDED:
            sock.shutdown(socket.SHUT_WR)


def end(sock: socket.socket, incoming: bytes) -> None:
    """Make a new socket one whose connection has ended, with something left to read: through a connection to nobody."""
    host = "::1" if sock.family == socket.AF_INET6 else "127.0.0.1"
    begin_repair(sock)
    if not sock.getsockname()[1]:
        sock.bind((host, 0))
    peer = host, NOBODYS_PORT
    state = TcpStreamEntry(inq_len=len(incoming), inq_seq=len(incoming) + 2, outq_len=0, outq_seq=2, opt_mask=0,
                           snd_wscale=0, mss_clamp=PORTION)  # fmt: skip
    stream = _Stream(sock, LAST_ACK, state, (host, 0), peer)
    stream.set_sequences()
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, LARGEST_BUFFER)
    sock.connect(peer)
    stream.own = sock.getsockname()[:2]
    stream.fill(incoming, b"")
    stream.end_directions(rest=False)
    stream.acknowledge_end()
    if state_of(sock) != CLOSE:
        raise OSError(errno.EPROTO, "a TCP connection does not come to its end")
    end_repair(sock, reuse=False)
