# SPDX-License-Identifier: Apache-2.0
"""Sockets and what is queued in them: unix, inet, netlink, packet, TCP streams."""

from __future__ import annotations

from stasis.process.images.message import (
    HEX,
    Message,
    OpenEnum,
    boolean,
    bytestring,
    enumeration,
    fixed64,
    message,
    sint32,
    string,
    uint32,
    uint64,
)
from stasis.process.images.schema.common import FownEntry

__all__ = [
    "DatagramEntry",
    "FilePermsEntry",
    "InetSkEntry",
    "IpOptsEntry",
    "IpOptsRawEntry",
    "NetlinkSkEntry",
    "PacketMclist",
    "PacketRing",
    "PacketSockEntry",
    "ScmEntry",
    "SkOptsEntry",
    "SkPacketEntry",
    "SkShutdown",
    "TcpOptsEntry",
    "TcpStreamEntry",
    "UnixSkEntry",
]


class SkShutdown(OpenEnum):
    NONE = 0
    READ = 1
    WRITE = 2
    BOTH = 3


class SkOptsEntry(Message):
    so_sndbuf: int = uint32(1)
    so_rcvbuf: int = uint32(2)
    so_snd_tmo_sec: int = uint64(3)
    so_snd_tmo_usec: int = uint64(4)
    so_rcv_tmo_sec: int = uint64(5)
    so_rcv_tmo_usec: int = uint64(6)
    reuseaddr: bool | None = boolean(7, default=None)
    so_priority: int | None = uint32(8, default=None)
    so_rcvlowat: int | None = uint32(9, default=None)
    so_mark: int | None = uint32(10, default=None)
    so_passcred: bool | None = boolean(11, default=None)
    so_passsec: bool | None = boolean(12, default=None)
    so_dontroute: bool | None = boolean(13, default=None)
    so_no_check: bool | None = boolean(14, default=None)
    so_bound_dev: str | None = string(15, default=None)
    so_filter: list[int] = fixed64(16, factory=list)
    so_reuseport: bool | None = boolean(17, default=None)
    so_broadcast: bool | None = boolean(18, default=None)
    so_keepalive: bool | None = boolean(19, default=None)
    tcp_keepcnt: int | None = uint32(20, default=None)
    tcp_keepidle: int | None = uint32(21, default=None)
    tcp_keepintvl: int | None = uint32(22, default=None)
    so_oobinline: int | None = uint32(23, default=None)
    so_linger: int | None = uint32(24, default=None)
    so_buf_lock: int | None = uint32(25, default=None)


class FilePermsEntry(Message):
    mode: int = uint32(1)
    uid: int = uint32(2)
    gid: int = uint32(3)


class UnixSkEntry(Message):
    id: int = uint32(1)
    ino: int = uint32(2)
    type: int = uint32(3, show="socket_type")
    state: int = uint32(4, show="socket_state")
    flags: int = uint32(5, show=HEX)
    uflags: int = uint32(6, show=HEX)
    backlog: int = uint32(7)
    peer: int = uint32(8)
    fown: FownEntry = message(9, FownEntry)
    opts: SkOptsEntry = message(10, SkOptsEntry)
    name: bytes = bytestring(11, show="quoted")
    shutdown: SkShutdown | None = enumeration(12, SkShutdown, default=None)
    file_perms: FilePermsEntry | None = message(13, FilePermsEntry, default=None)
    name_dir: str | None = string(14, default=None)
    deleted: bool | None = boolean(15, default=None)
    ns_id: int | None = uint32(16, default=None)
    mnt_id: int = sint32(17, default=-1)


class IpOptsRawEntry(Message):
    hdrincl: bool | None = boolean(1, default=None)
    nodefrag: bool | None = boolean(2, default=None)
    checksum: bool | None = boolean(3, default=None)
    icmpv_filter: list[int] = uint32(4, factory=list)


class IpOptsEntry(Message):
    freebind: bool | None = boolean(1, default=None)
    raw: IpOptsRawEntry | None = message(4, IpOptsRawEntry, default=None)
    pktinfo: bool | None = boolean(5, default=None)
    tos: int | None = uint32(6, default=None)
    ttl: int | None = uint32(7, default=None)


class TcpOptsEntry(Message):
    cork: bool | None = boolean(1, default=None)
    nodelay: bool | None = boolean(2, default=None)
    keepcnt: int | None = uint32(3, default=None)
    keepidle: int | None = uint32(4, default=None)
    keepintvl: int | None = uint32(5, default=None)


class InetSkEntry(Message):
    id: int = uint32(1)
    ino: int = uint32(2)
    family: int = uint32(3, show="family")
    type: int = uint32(4, show="socket_type")
    proto: int = uint32(5, show="protocol")
    state: int = uint32(6, show="socket_state")
    src_port: int = uint32(7)
    dst_port: int = uint32(8)
    flags: int = uint32(9, show=HEX)
    backlog: int = uint32(10)
    src_addr: list[int] = uint32(11, factory=list, show="address")
    dst_addr: list[int] = uint32(12, factory=list, show="address")
    fown: FownEntry = message(13, FownEntry)
    opts: SkOptsEntry = message(14, SkOptsEntry)
    v6only: bool | None = boolean(15, default=None)
    ip_opts: IpOptsEntry | None = message(16, IpOptsEntry, default=None)
    ifname: str | None = string(17, default=None)
    ns_id: int | None = uint32(18, default=None)
    shutdown: SkShutdown | None = enumeration(19, SkShutdown, default=None)
    tcp_opts: TcpOptsEntry | None = message(20, TcpOptsEntry, default=None)


class TcpStreamEntry(Message):
    inq_len: int = uint32(1)
    inq_seq: int = uint32(2)
    outq_len: int = uint32(3)
    outq_seq: int = uint32(4)
    opt_mask: int = uint32(5, show=HEX)
    snd_wscale: int = uint32(6)
    mss_clamp: int = uint32(7)
    rcv_wscale: int | None = uint32(8, default=None)
    timestamp: int | None = uint32(9, default=None)
    cork: bool | None = boolean(10, default=None)
    nodelay: bool | None = boolean(11, default=None)
    unsq_len: int | None = uint32(12, default=None)
    snd_wl1: int | None = uint32(13, default=None)
    snd_wnd: int | None = uint32(14, default=None)
    max_window: int | None = uint32(15, default=None)
    rcv_wnd: int | None = uint32(16, default=None)
    rcv_wup: int | None = uint32(17, default=None)


class NetlinkSkEntry(Message):
    id: int = uint32(1)
    ino: int = uint32(2)
    protocol: int = uint32(3)
    state: int = uint32(4)
    flags: int = uint32(6, show=HEX)
    portid: int = uint32(7)
    groups: list[int] = uint32(8, factory=list)
    dst_portid: int = uint32(9)
    dst_group: int = uint32(10)
    fown: FownEntry = message(11, FownEntry)
    opts: SkOptsEntry = message(12, SkOptsEntry)
    ns_id: int | None = uint32(13, default=None)


class PacketMclist(Message):
    index: int = uint32(1)
    type: int = uint32(2)
    addr: bytes = bytestring(3)


class PacketRing(Message):
    block_size: int = uint32(1)
    block_nr: int = uint32(2)
    frame_size: int = uint32(3)
    frame_nr: int = uint32(4)
    retire_tmo: int = uint32(5)
    sizeof_priv: int = uint32(6)
    features: int = uint32(7)


class PacketSockEntry(Message):
    id: int = uint32(1)
    type: int = uint32(2)
    protocol: int = uint32(3)
    flags: int = uint32(4, show=HEX)
    ifindex: int = uint32(5)
    fown: FownEntry = message(6, FownEntry)
    opts: SkOptsEntry = message(7, SkOptsEntry)
    version: int = uint32(8)
    reserve: int = uint32(9)
    aux_data: bool = boolean(10)
    orig_dev: bool = boolean(11)
    vnet_hdr: bool = boolean(12)
    loss: bool = boolean(13)
    timestamp: int = uint32(14)
    copy_thresh: int = uint32(15)
    mclist: list[PacketMclist] = message(16, PacketMclist, factory=list)
    fanout: int = uint32(17, default=4294967295)
    rx_ring: PacketRing | None = message(18, PacketRing, default=None)
    tx_ring: PacketRing | None = message(19, PacketRing, default=None)
    ns_id: int | None = uint32(20, default=None)


class ScmEntry(Message):
    type: int = uint32(1)
    rights: list[int] = uint32(2, factory=list)


class DatagramEntry(Message):
    id_for: int = uint32(1)
    length: int = uint32(2)
    address: bytes = bytestring(3)
    port: int = uint32(4)


class SkPacketEntry(Message):
    id_for: int = uint32(1)
    length: int = uint32(2)
    scm: list[ScmEntry] = message(4, ScmEntry, factory=list)
