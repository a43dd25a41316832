# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: devices and their settings."""

from __future__ import annotations

from stasis.process.images.message import (
    HEX,
    Message,
    OpenEnum,
    boolean,
    bytestring,
    enumeration,
    int32,
    message,
    string,
    uint32,
)
from stasis.process.images.schema.common import SysctlEntry

__all__ = [
    "MacvlanLinkEntry",
    "NdType",
    "NetDeviceEntry",
    "NetnsEntry",
    "NetnsId",
    "SitEntry",
    "TunLinkEntry",
]


class NdType(OpenEnum):
    LOOPBACK = 1
    VETH = 2
    TUN = 3
    EXTLINK = 4
    VENET = 5
    BRIDGE = 6
    MACVLAN = 7
    SIT = 8


class MacvlanLinkEntry(Message):
    mode: int = uint32(1)
    flags: int | None = uint32(2, default=None)


class TunLinkEntry(Message):
    flags: int = uint32(1, show=HEX)
    owner: int = int32(2)
    group: int = int32(3)
    vnethdr: int = uint32(4)
    sndbuf: int = uint32(5)


class SitEntry(Message):
    link: int | None = uint32(1, default=None)
    local: list[int] = uint32(2, factory=list, show="address")
    remote: list[int] = uint32(3, factory=list, show="address")
    ttl: int | None = uint32(4, default=None)
    tos: int | None = uint32(5, default=None)
    pmtudisc: bool | None = boolean(6, default=None)
    proto: int | None = uint32(7, default=None)
    flags: int | None = uint32(8, default=None)
    encap_type: int | None = uint32(9, default=None)
    encap_flags: int | None = uint32(10, default=None)
    encap_sport: int | None = uint32(11, default=None)
    encap_dport: int | None = uint32(12, default=None)
    rd_prefixlen: int | None = uint32(13, default=None)
    rd_prefix: list[int] = uint32(14, factory=list, show="address")
    relay_prefixlen: int | None = uint32(15, default=None)
    relay_prefix: list[int] = uint32(16, factory=list, show="address")


class NetDeviceEntry(Message):
    type: NdType = enumeration(1, NdType)
    ifindex: int = uint32(2)
    mtu: int = uint32(3)
    flags: int = uint32(4, show=HEX)
    name: str = string(5)
    tun: TunLinkEntry | None = message(6, TunLinkEntry, default=None)
    address: bytes | None = bytestring(7, default=None)
    conf: list[int] = int32(8, factory=list)
    conf4: list[SysctlEntry] = message(9, SysctlEntry, factory=list)
    conf6: list[SysctlEntry] = message(10, SysctlEntry, factory=list)
    macvlan: MacvlanLinkEntry | None = message(11, MacvlanLinkEntry, default=None)
    peer_ifindex: int | None = uint32(12, default=None)
    peer_nsid: int | None = uint32(13, default=None)
    master: int | None = uint32(14, default=None)
    sit: SitEntry | None = message(15, SitEntry, default=None)


class NetnsId(Message):
    target_ns_id: int = uint32(1)
    netnsid_value: int = int32(2)


class NetnsEntry(Message):
    def_conf: list[int] = int32(1, factory=list)
    all_conf: list[int] = int32(2, factory=list)
    def_conf4: list[SysctlEntry] = message(3, SysctlEntry, factory=list)
    all_conf4: list[SysctlEntry] = message(4, SysctlEntry, factory=list)
    def_conf6: list[SysctlEntry] = message(5, SysctlEntry, factory=list)
    all_conf6: list[SysctlEntry] = message(6, SysctlEntry, factory=list)
    nsids: list[NetnsId] = message(7, NetnsId, factory=list)
    ext_key: str | None = string(8, default=None)
    unix_conf: list[SysctlEntry] = message(9, SysctlEntry, factory=list)
    ipv4_sysctl: list[SysctlEntry] = message(10, SysctlEntry, factory=list)
