# SPDX-License-Identifier: Apache-2.0
"""Network namespaces (network_namespaces(7)): devices (loopback, veth, bridge), addresses, routes, rules, settings, and
tables of nf_tables where the program nft is there.

Addresses, routes and rules are kept as the kernel told them, behind a number by which `ip addr restore` and the like
know them. The other end of a veth device may be outside; whoever restores says how it is called there.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.errors import StasisError, UsageError
from stasis.linux import nftables
from stasis.linux.namespaces import FLAGS, unshare
from stasis.linux.netlink import attribute, u32
from stasis.linux.rtnetlink import ADDRESS, ROUTE, RULE, Link, Message, RouteNetlink, parse
from stasis.process.images.damage import damaged
from stasis.process.images.schema.network import NdType, NetDeviceEntry, NetnsEntry
from stasis.process.namespaces import netconf

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "make", "write"]

MAGIC = struct.Struct("<I")
STREAMS = {"ifaddr": (0x47361222, ADDRESS, socket.AF_UNSPEC), "route": (0x45311224, ROUTE, socket.AF_INET),
           "route6": (0x45311224, ROUTE, socket.AF_INET6), "rule": (0x71706986, RULE, socket.AF_UNSPEC)}  # fmt: skip
"""Name of the image, the number it begins with (iproute2: ip/ipaddress.c, iproute.c, iprule.c), and what is in it."""
KINDS = {"veth": NdType.VETH, "bridge": NdType.BRIDGE}
FALLBACK = ("tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0")
"""Devices that the kernel makes in every namespace (net.core.fb_tunnels_only_for_init_net)."""
IFF_UP = 1
RTPROT_KERNEL = 2
ROUTE_FLAGS = 6
"""RTNH_F_PERVASIVE, RTNH_F_ONLINK: the others tell what the kernel found."""
RTA_GATEWAY, RTA_CACHEINFO, IFA_FLAGS, IFA_F_NODAD = 5, 12, 8, 2
CREATE, EXCLUSIVE, REPLACE = 0x400, 0x200, 0x100
OLD_TABLES = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
LOCK_TABLE = "CRIU-"


def check(root: int, findings: Findings) -> None:
    """Note what cannot be kept of the namespace, which the caller has entered."""
    with RouteNetlink() as netlink:
        for link in netlink.links():
            if reason := _why_lost(link):
                findings.add(root, f"network device {link.name}", reason)
    for path in OLD_TABLES:
        if os.path.exists(path) and Path(path).read_text().strip():
            findings.add(root, "network namespace", "it has tables of the old iptables, which are not supported")
    if _tables() and shutil.which("nft") is None:
        findings.add(root, "network namespace", "to keep its tables of nf_tables needs the program nft")


def _why_lost(link: Link) -> str:
    if link.is_loopback or link.kind in KINDS or _is_fallback(link):
        return ""
    return f"devices of the kind {link.kind or 'hardware'} cannot be made again"


def _is_fallback(link: Link) -> bool:
    return link.name in FALLBACK and not link.flags & IFF_UP


def _tables() -> list[str]:
    try:
        return [name for name in nftables.tables(all_families=True) if not name.startswith(LOCK_TABLE)]
    except OSError:
        return []  # a kernel without them


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """Everything of the namespace, which the caller has entered."""
    with RouteNetlink() as netlink:
        for link in netlink.links():
            if not _is_fallback(link):
                out.write("netdev", _device(link, number), number=number)
        for name, (magic, kind, family) in STREAMS.items():
            messages = netlink.dump(kind, family)
            with out.create(f"{name}-{number}.img") as file:
                file.write(MAGIC.pack(magic) + b"".join(message.raw for message in messages))
    lists = {f"{short}_conf{protocol[-1]}": netconf.read_list(protocol, device)
             for protocol in netconf.NAMES for short, device in (("def", "default"), ("all", "all"))}  # fmt: skip
    out.write("netns", NetnsEntry(**lists, unix_conf=netconf.unix_settings()), number=number)  # type: ignore[arg-type]
    if _tables():
        with out.create(f"nftables-{number}.img") as file:
            file.write(_ruleset())
    return [f"the setting net.{name} of the network namespace will be that of a new one" for name in netconf.changed()]


def _device(link: Link, namespace: int) -> NetDeviceEntry:
    kind = NdType.LOOPBACK if link.is_loopback else KINDS[link.kind]
    entry = NetDeviceEntry(
        type=kind, ifindex=link.number, mtu=link.mtu, flags=link.flags, name=link.name,
        address=None if link.is_loopback else link.address, conf4=netconf.read_list("ipv4", link.name),
        conf6=netconf.read_list("ipv6", link.name), master=link.master or None, peer_ifindex=link.peer or link.number,
    )  # fmt: skip
    if link.peer_namespace < 0:
        entry.peer_nsid = namespace
    return entry


def _ruleset() -> bytes:
    done = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise StasisError(f"the program nft cannot tell the tables: {done.stderr.decode(errors='replace').strip()}")
    return b"".join(table for table in _split(done.stdout) if f" {LOCK_TABLE}".encode() not in table.split(b"{")[0])


def _split(text: bytes) -> list[bytes]:
    """The tables of a ruleset: each begins at the margin."""
    found: list[bytes] = []
    for line in text.splitlines(keepends=True):
        if line.startswith(b"table "):
            found.append(b"")
        if found:
            found[-1] += line
    return found


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """A namespace with all that the images say is in it."""
    images = chain[0]
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with RouteNetlink() as before:
            unshare(FLAGS["net"])
            with RouteNetlink() as netlink:
                _fill(images, number, netlink, _Outside(before, home, settings.links))
    except OSError as error:
        raise StasisError(f"the network namespace cannot be filled: {error}", errno=error.errno or 0) from error
    finally:
        os.close(home)


class _Outside:
    """The namespace that the restorer comes from."""

    def __init__(self, netlink: RouteNetlink, namespace: int, names: Mapping[str, str]) -> None:
        self.netlink = netlink
        self.namespace = namespace
        self.names = names


def _fill(images: ImageSet, number: int, netlink: RouteNetlink, outside: _Outside) -> None:
    conf: NetnsEntry = images.one("netns", number)
    devices: list[NetDeviceEntry] = images.messages("netdev", number)
    netconf.write_list("ipv4", "all", conf.all_conf4)
    netconf.write_list("ipv6", "all", conf.all_conf6)
    netconf.write_list("unix", "", conf.unix_conf)
    made: set[int] = set()
    for device in devices:
        if device.ifindex not in made:
            made |= _make_device(device, devices, netlink, outside)
    for device in devices:
        netconf.write_list("ipv4", device.name, device.conf4)
        netconf.write_list("ipv6", device.name, device.conf6)
        netlink.change_link(_wanted(device), master=device.master)
    netconf.write_list("ipv4", "default", conf.def_conf4)
    netconf.write_list("ipv6", "default", conf.def_conf6)
    _replay(images, number, netlink)
    _load_tables(images, number)


def _wanted(device: NetDeviceEntry) -> Link:
    kind = next((name for name, type_ in KINDS.items() if type_ == device.type), "")
    return Link(device.ifindex, device.name, device.flags, device.mtu, device.address or b"", kind,
                device.type == NdType.LOOPBACK)  # fmt: skip


def _make_device(
    device: NetDeviceEntry, devices: Sequence[NetDeviceEntry], netlink: RouteNetlink, outside: _Outside
) -> set[int]:
    """Indexes of what was made. A pair within the namespace is made at once."""
    if device.type == NdType.LOOPBACK:
        return {device.ifindex}
    if device.type not in KINDS.values():
        raise StasisError(f"the network device {device.name} is of a kind that cannot be restored")
    if device.type != NdType.VETH:
        netlink.make_link(_wanted(device))
        return {device.ifindex}
    if device.peer_nsid is not None:
        other = next((one for one in devices if one.ifindex == device.peer_ifindex and one is not device), None)
        if other is None:
            raise StasisError(f"the other end of the network device {device.name} is missing in the images")
        netlink.make_pair(_wanted(device), _wanted(other))
        return {device.ifindex, other.ifindex}
    _make_outwards(device, netlink, outside)
    return {device.ifindex}


def _make_outwards(device: NetDeviceEntry, netlink: RouteNetlink, outside: _Outside) -> None:
    if device.name not in outside.names:
        raise UsageError(f"the other end of the network device {device.name} was outside of the dumped tree",
                         hint=f"say how it is to be called: --veth {device.name}=NAME, or NAME@BRIDGE")  # fmt: skip
    name, _, bridge = outside.names[device.name].partition("@")
    master = outside.netlink.index_of(bridge) if bridge else None
    if bridge and master is None:
        raise UsageError(f"there is no network device {bridge} to connect {name} with", hint="make the bridge first")
    netlink.make_pair(_wanted(device), Link(0, name, 0, device.mtu, b"", "veth", False), outside.namespace)
    index = outside.netlink.index_of(name)
    assert index is not None
    outside.netlink.change_link(Link(index, name, device.flags & IFF_UP, device.mtu, b"", "veth", False), master=master)


def _replay(images: ImageSet, number: int, netlink: RouteNetlink) -> None:
    """Addresses first, then rules; routes to neighbours before those that lead over them."""
    for message in _stream(images, "ifaddr", number):
        netlink.request(ADDRESS, CREATE | REPLACE, _address(message), "add an address")
    for message in _stream(images, "rule", number):
        _request(netlink, RULE, CREATE | EXCLUSIVE, message.raw[16:], "add a rule")
    routes = [*_stream(images, "route", number), *_stream(images, "route6", number)]
    for message in sorted(routes, key=lambda message: RTA_GATEWAY in message.attributes):
        if message.body[5] != RTPROT_KERNEL:
            _request(netlink, ROUTE, CREATE | EXCLUSIVE, _route(message), "add a route")


def _request(netlink: RouteNetlink, kind: int, flags: int, content: bytes, what: str) -> None:
    """One that is there already is as good."""
    try:
        netlink.request(kind, flags, content, what)
    except FileExistsError:
        return


def _stream(images: ImageSet, name: str, number: int) -> list[Message]:
    magic, kind, _ = STREAMS[name]
    try:
        fd = images.open_file(f"{name}-{number}.img")
    except FileNotFoundError:
        return []
    with open(fd, "rb") as file:
        data = file.read()
    try:
        found = list(parse(data[MAGIC.size :]))
    except ValueError as error:
        raise damaged(images.file_path(name, number), 0, str(error)) from error
    if data[: MAGIC.size] != MAGIC.pack(magic) or any(message.kind != kind for message in found):
        raise damaged(images.file_path(name, number), 0, "it is no image of this kind")
    return found


def _address(message: Message) -> bytes:
    """Usable at once: nobody else can have got it meanwhile but by a mistake that was made before."""
    flags = int.from_bytes(message.attributes.get(IFA_FLAGS, b"\0\0\0\0"), "little") | IFA_F_NODAD
    kept = {kind: value for kind, value in message.attributes.items() if kind != IFA_FLAGS}
    return message.body + b"".join(attribute(kind, value) for kind, value in kept.items()) + u32(IFA_FLAGS, flags)


def _route(message: Message) -> bytes:
    kept = b"".join(attribute(kind, value) for kind, value in message.attributes.items() if kind != RTA_CACHEINFO)
    flags = int.from_bytes(message.body[8:12], "little") & ROUTE_FLAGS
    return message.body[:8] + flags.to_bytes(4, "little") + kept


def _load_tables(images: ImageSet, number: int) -> None:
    try:
        fd = images.open_file(f"nftables-{number}.img")
    except FileNotFoundError:
        return
    with open(fd, "rb") as file:
        done = subprocess.run(["nft", "-f", "-"], stdin=file, capture_output=True, check=False)
    if done.returncode:
        raise StasisError(f"the program nft cannot make the tables: {done.stderr.decode(errors='replace').strip()}",
                          errno=errno.EIO)  # fmt: skip
