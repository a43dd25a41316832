# SPDX-License-Identifier: Apache-2.0
"""Nodes of the kernel's NBD client. A restarted server is connected again under a mounted device."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import time
from typing import Any

from stasis.block.frontend.node import Node, Wish, check_size, load_module, unused, wait_until
from stasis.errors import PermissionDeniedError, StasisError, StateError, UnsupportedError
from stasis.linux import nbd_netlink
from stasis.nbd import protocol as p
from stasis.nbd.negotiation import Negotiated, negotiate
from stasis.nbd.uri import NbdUri

__all__ = ["KIND", "abandon", "connect", "disconnect", "is_present", "probe", "reconnect"]

KIND = "nbd"

REQUEST_TIMEOUT = 30
"""Seconds after which the kernel sends a request again that a dead server took with it. It also gives up a server
that is slower than that, so it must be longer than any disk takes for one request."""
DEAD_TIMEOUT = 300
"""Seconds that I/O waits for a server to come back before it fails."""
HANDSHAKE_TIMEOUT = 10.0
NODE_WAIT = 10.0
ADOPTION_WAIT = 10.0
ADOPTION_POLL = 0.1

KERNEL_FLAGS = (
    p.NBD_FLAG_HAS_FLAGS
    | p.NBD_FLAG_READ_ONLY
    | p.NBD_FLAG_SEND_FLUSH
    | p.NBD_FLAG_SEND_FUA
    | p.NBD_FLAG_ROTATIONAL
    | p.NBD_FLAG_SEND_TRIM
    | p.NBD_FLAG_SEND_WRITE_ZEROES
)
"""Transmission flags that the kernel acts on; which of them it knows differs."""


def probe() -> bool:
    """Whether the kernel has an NBD client that we may use."""
    if os.geteuid() != 0:
        return False
    if not nbd_netlink.available():
        load_module("nbd")
    return nbd_netlink.available()


def connect(wish: Wish) -> Node:
    """Negotiate, give the connection to the kernel, and wait for the node."""
    sock, said = _dial(wish.uri)
    sector = wish.sector_for(said.minimum_block)
    size = said.size // sector * sector
    identifier = f"stasis-{wish.name}-{secrets.token_hex(4)}"
    flags = said.flags & KERNEL_FLAGS | (p.NBD_FLAG_READ_ONLY if wish.read_only else 0)
    with sock:
        wish.expect(said.size)
        index = _give_away(sock, size, sector, flags, identifier)
    node = nbd_netlink.node(index)
    try:
        if not wait_until(lambda: os.path.exists(node), NODE_WAIT):
            raise StasisError(f"{node} does not appear", hint="is /dev a devtmpfs?")
        check_size(node, size)
    except BaseException:
        nbd_netlink.disconnect(index)
        raise
    return Node.of(wish, KIND, node, index=index, identifier=identifier, size=said.size)


def _give_away(sock: socket.socket, size: int, sector: int, flags: int, identifier: str) -> int:
    try:
        return nbd_netlink.connect(
            sock, size, sector, flags, timeout=REQUEST_TIMEOUT, dead_timeout=DEAD_TIMEOUT, identifier=identifier
        )
    except PermissionError as error:
        raise PermissionDeniedError(f"the kernel's NBD client is not for us: {error.strerror}") from error


def _dial(uri: NbdUri) -> tuple[socket.socket, Negotiated]:
    """A negotiated connection, ready for the kernel: it cannot do TLS and knows simple replies only."""
    if uri.tls or not uri.socket:
        raise UnsupportedError("the kernel's NBD client is given unix sockets without TLS only")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(HANDSHAKE_TIMEOUT)
        sock.connect(uri.socket)
        _, _, said = negotiate(sock, uri.export, (), None, "", structured=False)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock, said


def is_present(state: dict[str, Any]) -> bool:
    """Whether the index still is the device that we made, and nobody else's who got it later."""
    index = state["index"]
    # Before Linux 5.14 there is no identifier to compare.
    return nbd_netlink.connected(index) and nbd_netlink.backend(index) in (None, state["identifier"])


def _offer(state: dict[str, Any]) -> bool:
    """Offer the kernel a new connection; False if it keeps its old one. Raises what dialling and size tell."""
    sock, said = _dial(NbdUri.parse(state["uri"]))
    with sock:
        if said.size != state["size"]:
            raise StateError(f"{state['uri']} has {said.size} bytes now and had {state['size']}")
        nbd_netlink.reconfigure(state["index"], sock, state["identifier"])
        return nbd_netlink.is_adopted(sock)


def _can_flush(state: dict[str, Any]) -> bool:
    """Whether there is a server behind the node; one that was restarted is connected again."""
    try:
        _offer(state)
    except (OSError, StasisError):
        return False
    return True


def disconnect(state: dict[str, Any]) -> None:
    """Flush and disconnect. With the server gone there is nobody to flush to, and waiting for it helps nobody."""
    if not is_present(state):
        return
    index = state["index"]
    with unused(state["node"], flush=_can_flush(state)):
        try:
            nbd_netlink.disconnect(index)
        except OSError as error:
            if error.errno != errno.EINVAL:  # went away by itself
                raise
    if not wait_until(lambda: not nbd_netlink.connected(index), NODE_WAIT):
        raise StasisError(f"{state['node']} does not disconnect", errno=errno.ETIMEDOUT)
    # The kernel drops the nodes of the partitions only when the empty device is looked at again.
    with contextlib.suppress(OSError):
        os.close(os.open(state["node"], os.O_RDONLY | os.O_CLOEXEC))


def abandon(state: dict[str, Any]) -> None:
    """Disconnect without asking who uses it."""
    if is_present(state):
        with contextlib.suppress(OSError):  # it went by itself meanwhile
            nbd_netlink.disconnect(state["index"])


def reconnect(state: dict[str, Any]) -> None:
    """Offer new connections until the kernel, having noticed the end of the old one, takes one."""
    if not is_present(state):
        raise StateError(f"{state['node']} is not the device of {state['name']} any more")
    deadline = time.monotonic() + ADOPTION_WAIT
    while not _offer(state):
        if time.monotonic() > deadline:
            raise StateError(f"{state['node']} keeps its old connection, which still looks alive")
        time.sleep(ADOPTION_POLL)
