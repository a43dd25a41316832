# SPDX-License-Identifier: Apache-2.0
"""Nodes of nbdublk: libnbd's program that makes a ublk device of an export."""

from __future__ import annotations

import itertools
import os
from typing import Any

from stasis.block.frontend.helper import END_WAIT, START_WAIT, Helper, Shape, is_installed, refuse_reconnect
from stasis.block.frontend.node import Node, Wish, check_size, load_module, unused, wait_until
from stasis.errors import StasisError

__all__ = ["KIND", "abandon", "connect", "disconnect", "is_present", "probe", "reconnect"]

KIND = "nbdublk"

CONTROL = "/dev/ublk-control"
PROGRAM = "nbdublk"


def probe() -> bool:
    """Whether there are the program and the driver."""
    if not is_installed(PROGRAM):
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
    shape, node = Shape.ask(wish), _free_node()
    helper = Helper.spawn([PROGRAM, *shape.options, node, str(wish.uri)], wish.directory)
    try:
        wait_until(lambda: os.path.exists(node) or not helper.runs(), START_WAIT)
        if not os.path.exists(node):
            raise StasisError(f"nbdublk makes no {node}: {Helper.last_words(wish.directory) or 'no reason given'}")
        check_size(node, shape.size)
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


def abandon(state: dict[str, Any]) -> None:
    """End the program; the driver fails what is under way."""
    Helper.of(state).end(END_WAIT)


def is_present(state: dict[str, Any]) -> bool:
    """Whether the program still carries the device."""
    return os.path.exists(state["node"]) and Helper.of(state).runs()


def reconnect(state: dict[str, Any]) -> None:
    refuse_reconnect(state, PROGRAM)
