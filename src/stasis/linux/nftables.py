# SPDX-License-Identifier: Apache-2.0
"""nf_tables over netlink (include/uapi/linux/netfilter/nf_tables.h): as much as it takes to drop the packets of given
TCP connections. Works without the program nft."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

from stasis.linux import libc
from stasis.linux.netlink import attribute, attributes, nested, string

__all__ = ["PASSING_MARK", "Tuple", "create_drop_table", "delete_table", "drop", "tables"]

NETLINK_NETFILTER = 12
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NEWTABLE, GETTABLE, DELTABLE, NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM = 0, 1, 2, 3, 6, 9, 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLM_F_CREATE, NLM_F_APPEND, NLM_F_EXCL = 0x1, 0x4, 0x300, 0x400, 0x800, 0x200
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGHDR = struct.Struct("=IHHII")
NFGENMSG = struct.Struct(">BBH")
ERROR = struct.Struct("=i")
RECEIVE_SIZE = 1 << 16
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
NF_DROP, NF_ACCEPT = 0, 1
HOOKS = {"input": 1, "output": 3}  # NF_INET_LOCAL_IN, NF_INET_LOCAL_OUT
META_MARK, META_NFPROTO, META_L4PROTO = 3, 15, 16
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
FIRST_REGISTER = 8  # NFT_REG32_00: four bytes each
LIST_ELEMENT = 1

PASSING_MARK = 0xC114
"""Packets with this mark pass: the one that criu gives its own."""
FAMILIES = {4: (NFPROTO_IPV4, "ipv4", 12, 16, 4), 6: (NFPROTO_IPV6, "ipv6", 8, 24, 16)}
"""By the version of the protocol: its number, name of the set, and where a header has its two addresses."""

Tuple = tuple[str, int, str, int]
"""One end's address and port, and the other's. IPv4 addresses mapped into IPv6 are IPv4 ones."""

_Message = tuple[int, bytes, int]
"""Type, content, flags."""


def create_drop_table(name: str) -> None:
    """A table that drops the packets of connections named with `drop`. EEXIST; EPERM without CAP_NET_ADMIN; others
    where the kernel has no nf_tables."""
    messages = [_message(NEWTABLE, string(1, name), NLM_F_CREATE | NLM_F_EXCL)]
    for _, set_name, _, _, size in FAMILIES.values():
        messages.append(_message(NEWSET, string(1, name) + string(2, set_name) + _be32(3, 0) + _be32(4, 0)
                                 + _be32(5, 2 * size + 8) + _be32(10, size), NLM_F_CREATE))  # fmt: skip
    for chain, number in HOOKS.items():
        hook = nested(4, _be32(1, number) + _be32(2, 0))
        messages.append(_message(NEWCHAIN, string(1, name) + string(3, chain) + hook + _be32(5, NF_ACCEPT)
                                 + string(7, "filter"), NLM_F_CREATE))  # fmt: skip
        marked = [_meta(META_MARK), _equals(struct.pack("=I", PASSING_MARK)), _verdict(NF_ACCEPT)]
        messages.append(_rule(name, chain, marked))
        messages += [_rule(name, chain, _dropping(version)) for version in FAMILIES]
    _commit(messages)


def drop(name: str, connections: Iterable[Tuple]) -> None:
    """Drop the packets of these connections, in both directions, from here on."""
    elements: dict[str, bytes] = {}
    for address, port, other, other_port in connections:
        version, ends = _ends((address, port), (other, other_port))
        for first, second in (ends, ends[::-1]):
            key = nested(LIST_ELEMENT, nested(1, attribute(1, first + second)))
            set_name = FAMILIES[version][1]
            elements[set_name] = elements.get(set_name, b"") + key
    for set_name, keys in elements.items():
        _commit([_message(NEWSETELEM, string(1, name) + string(2, set_name) + nested(3, keys), NLM_F_CREATE)])


def delete_table(name: str) -> None:
    """Let the packets pass again. ENOENT where there is no such table."""
    _commit([_message(DELTABLE, string(1, name))])


def tables(*, all_families: bool = False) -> list[str]:
    """The names of all tables of the family inet, or of all families."""
    found = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
        kind, content, _ = _message(GETTABLE, b"")
        if all_families:
            content = NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)
        sock.send(_encoded(kind, content, NLM_F_DUMP, 1))
        for kind, body in _messages(sock):
            if kind == NLMSG_ERROR:
                _raise(body)
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                break
            found.append(attributes(body[NFGENMSG.size :])[1].rstrip(b"\0").decode(errors="replace"))
    return found


def _ends(*ends: tuple[str, int]) -> tuple[int, list[bytes]]:
    """IP version, and address and port of both ends as registers hold them."""
    found = []
    for address, port in ends:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        found.append((parsed.version, parsed.packed + struct.pack(">H2x", port)))
    return found[0][0], [raw for _, raw in found]


def _dropping(version: int) -> list[bytes]:
    """Load addresses and ports as a key of the set has them, look it up, drop."""
    protocol, set_name, source, target, size = FAMILIES[version]
    words = size // 4
    tcp = [_meta(META_NFPROTO), _equals(bytes([protocol])), _meta(META_L4PROTO), _equals(bytes([socket.IPPROTO_TCP]))]
    loads = [
        _payload(FIRST_REGISTER, NETWORK_HEADER, source, size),
        _payload(FIRST_REGISTER + words, TRANSPORT_HEADER, 0, 2),
        _payload(FIRST_REGISTER + words + 1, NETWORK_HEADER, target, size),
        _payload(FIRST_REGISTER + 2 * words + 1, TRANSPORT_HEADER, 2, 2),
    ]
    return [*tcp, *loads, _expression("lookup", string(1, set_name) + _be32(2, FIRST_REGISTER)), _verdict(NF_DROP)]


def _be32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _expression(name: str, content: bytes) -> bytes:
    return nested(LIST_ELEMENT, string(1, name) + nested(2, content))


def _meta(key: int) -> bytes:
    return _expression("meta", _be32(1, FIRST_REGISTER) + _be32(2, key))


def _equals(value: bytes) -> bytes:
    return _expression("cmp", _be32(1, FIRST_REGISTER) + _be32(2, 0) + nested(3, attribute(1, value)))


def _payload(register: int, header: int, offset: int, length: int) -> bytes:
    return _expression("payload", _be32(1, register) + _be32(2, header) + _be32(3, offset) + _be32(4, length))


def _verdict(code: int) -> bytes:
    return _expression("immediate", _be32(1, 0) + nested(2, nested(2, _be32(1, code))))


def _rule(table: str, chain: str, expressions: Sequence[bytes]) -> _Message:
    content = string(1, table) + string(2, chain) + nested(4, b"".join(expressions))
    return _message(NEWRULE, content, NLM_F_CREATE | NLM_F_APPEND)


def _message(kind: int, content: bytes, flags: int = 0) -> _Message:
    header = NFGENMSG.pack(NFPROTO_INET, 0, 0)
    return NFNL_SUBSYS_NFTABLES << 8 | kind, header + content, flags


def _encoded(kind: int, content: bytes, flags: int, sequence: int) -> bytes:
    return NLMSGHDR.pack(NLMSGHDR.size + len(content), kind, flags | NLM_F_REQUEST, sequence, 0) + content


def _commit(messages: Sequence[_Message]) -> None:
    """All of them or none. OSError with the kernel's errno."""
    batch = NFGENMSG.pack(socket.AF_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
    parts = [_encoded(NFNL_MSG_BATCH_BEGIN, batch, 0, 0)]
    for number, (kind, content, flags) in enumerate(messages, 1):
        last = NLM_F_ACK if number == len(messages) else 0
        parts.append(_encoded(kind, content, flags | last, number))
    parts.append(_encoded(NFNL_MSG_BATCH_END, batch, 0, len(messages) + 1))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
        sock.send(b"".join(parts))
        _acknowledged(sock, len(messages))


def _acknowledged(sock: socket.socket, sequence: int) -> None:
    """Wait for the answer to the last message, or an error to one before."""
    for kind, body in _messages(sock):
        if kind == NLMSG_ERROR:
            _raise(body)
            if NLMSGHDR.unpack_from(body, ERROR.size)[3] == sequence:
                return


def _raise(body: bytes) -> None:
    """Where an answer is an error."""
    (code,) = ERROR.unpack_from(body)
    if code:
        raise libc.error(-code, "nf_tables")


def _messages(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        data = sock.recv(RECEIVE_SIZE)
        while data:
            length, kind, *_ = NLMSGHDR.unpack_from(data)
            yield kind, data[NLMSGHDR.size : length]
            data = data[(length + 3) & ~3 :]
