# SPDX-License-Identifier: Apache-2.0
"""Rules of iptables that drop the packets of a connection: criu makes them for a dump unless told to use nftables.
We make none. A restore of such a set takes them away, or the connection would be there and silent.
"""

from __future__ import annotations

import ipaddress
import socket
import subprocess
from typing import TYPE_CHECKING

from stasis.errors import UnsupportedError

if TYPE_CHECKING:
    from stasis.process.images.schema.sockets import InetSkEntry

__all__ = ["drop_rules"]

MARK = "0xC114"
"""What packets bear that go through nevertheless (criu/include/net.h, SOCCR_MARK)."""


def drop_rules(found: InetSkEntry) -> None:
    """Take the rules for both directions of a connection away; no matter when they are not there."""
    from stasis.process.files.inet import ends_of

    address, port, peer, peer_port = ends_of(found)
    program, (address, peer) = _in_rules(found.family, address, peer)
    _delete(program, "INPUT", (peer, peer_port), (address, port))
    _delete(program, "OUTPUT", (address, port), (peer, peer_port))


def _in_rules(family: int, *addresses: str) -> tuple[str, tuple[str, ...]]:
    """The program for a connection, and how it has these addresses: an IPv6 socket's may be of IPv4 (::ffff:1.2.3.4),
    as those of a Java virtual machine are."""
    if family != socket.AF_INET6:
        return "iptables", addresses
    mapped = [ipaddress.IPv6Address(address).ipv4_mapped for address in addresses]
    return ("iptables", tuple(map(str, mapped))) if all(mapped) else ("ip6tables", addresses)


def _delete(program: str, chain: str, source: tuple[str, int], target: tuple[str, int]) -> None:
    command = [
        program, "-w", "-t", "filter", "-D", chain, "--protocol", "tcp", "-m", "mark", "!", "--mark", MARK,
        "--source", source[0], "--sport", str(source[1]), "--destination", target[0], "--dport", str(target[1]),
        "-j", "DROP",
    ]  # fmt: skip
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise UnsupportedError(f"the packets of its connections are dropped by rules of {program}, which is not here",
                               hint=f"install {program}") from error  # fmt: skip
