# SPDX-License-Identifier: Apache-2.0
"""Nodes of nbdublk: libnbd's program that makes a ublk device of an export."""

from __future__ import annotations

import itertools
import os
import shutil
from typing import Any

from stasis.block.frontend.helper import Helper
from stasis.block.frontend.node import Node, Wish, check_size, load_module, unused, wait_until
from stasis.errors import StasisError, UnsupportedError
from stasis.nbd.client import Client

__all__ = ["KIND", "connect", "disconnect", "probe", "reconnect"]

KIND = "nbdublk"

CONTROL = "/dev/ublk-control"
PROGRAM = "nbdublk"
HANDSHAKE_TIMEOUT = 10.0
START_WAIT = 20.0
END_WAIT = 10.0


def probe() -> bool:
    """Whether there are the program and the driver."""
    if os.geteuid() != 0 or shutil.which(PROGRAM) is None:
        return False
    if not os.path.exists(CONTROL):
        load_module("ublk_drv")
    return os.access(CONTROL, os.R_OK | os.W_OK)


def _free_node() -> str:
    """A number of our own choice: the program does not tell which one it was given."""
    for number in itertools.count():
        if not os.path.exists(f"/dev/ublkc{number}") and not os.path.exists(f"/dev/ublkb{number}"):
            return f"/dev/ublkb{number}"
    raise AssertionError("unreachable")


def connect(wish: Wish) -> Node:
    """Start nbdublk and wait for the node to have its size."""
    with Client.connect(wish.uri, timeout=HANDSHAKE_TIMEOUT) as client:
        wish.expect(client.size)
        sector = wish.sector_for(client.minimum_block)
        size = client.size // sector * sector
    node = _free_node()
    options = ["--readonly"] if wish.read_only else []
    helper = Helper.spawn([PROGRAM, *options, node, str(wish.uri)], wish.directory)
    try:
        wait_until(lambda: os.path.exists(node) or not helper.runs(), START_WAIT)
        if not os.path.exists(node):
            raise StasisError(f"nbdublk makes no {node}: {Helper.last_words(wish.directory) or 'no reason given'}")
        check_size(node, size)
    except BaseException:
        helper.end(END_WAIT)
        raise
    return Node.of(wish, KIND, node, **helper.as_state())


def disconnect(state: dict[str, Any]) -> None:
    """Flush, and end the program, which takes its device away."""
    helper = Helper.of(state)
    if os.path.exists(state["node"]) and helper.runs():
        with unused(state["node"]):
            pass  # flushed; the end of the program waits until its device is not open, so it is not held longer
    helper.end(END_WAIT)


def reconnect(state: dict[str, Any]) -> None:
    raise UnsupportedError(
        f"{state['node']} cannot be given a new connection: nbdublk has none",
        hint="unmount it, detach the device and attach it again",
    )
