# SPDX-License-Identifier: Apache-2.0
"""A local block device for an NBD export, with what the host has.

Three ways, tried in this order: the kernel's own NBD client, nbdublk (ublk driver), nbdfuse with a loop device. What a
host has is found by asking it, never by its version. What `connect` returns is plain data: any later process, after a
restart too, can take the node apart with it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from stasis.block.frontend import kernel_nbd, nbdfuse, nbdublk
from stasis.block.frontend.node import Node, Wish
from stasis.errors import PermissionDeniedError, StasisError, UnsupportedError
from stasis.linux import process
from stasis.nbd.uri import NbdUri

__all__ = ["Node", "abandon", "connect", "disconnect", "is_present", "probe", "reconnect"]

NOTHING_TO_USE = "this host has no way to make a block device of an NBD export"
WHAT_TO_INSTALL = "load the kernel's NBD client (modprobe nbd), or install nbdublk or nbdfuse (Debian: libnbd-bin)"


class _FrontEnd(Protocol):
    """What each of the ways does; see the functions of this module."""

    @property
    def KIND(self) -> str: ...
    def probe(self) -> bool: ...
    def connect(self, wish: Wish) -> Node: ...
    def disconnect(self, state: dict[str, Any]) -> None: ...
    def abandon(self, state: dict[str, Any]) -> None: ...
    def is_present(self, state: dict[str, Any]) -> bool: ...
    def reconnect(self, state: dict[str, Any]) -> None: ...


_FRONT_ENDS: tuple[_FrontEnd, ...] = (kernel_nbd, nbdublk, nbdfuse)
_BY_KIND = {front_end.KIND: front_end for front_end in _FRONT_ENDS}


def probe() -> list[str]:
    """The kinds of node that can be had here, the best one first. Loads kernel modules if it may."""
    return [front_end.KIND for front_end in _FRONT_ENDS if front_end.probe()]


def connect(
    uri: str | NbdUri,
    size: int | None = None,
    *,
    name: str,
    directory: Path,
    sector: int | None = None,
    read_only: bool = False,
    kind: str | None = None,
) -> Node:
    """Make a block device of an export that is being served.

    `size` (bytes) is what the export is expected to have, `sector` the node's logical block size: the export's
    minimum block size if not given. A tail of the export that fills no sector is not part of the node. `directory`
    is for this node alone and is made; `name` goes into messages and identifiers. `kind` asks for one way only.

    Raises PermissionDeniedError for whoever is not root, UnsupportedError if the host has no way or the asked one is
    not there; what else goes wrong is the StasisError of the last way tried. Nothing is left behind then.
    """
    if os.geteuid() != 0:
        raise PermissionDeniedError(
            f"a block device for {name} can be made by root only", hint="run the daemon as root, or use the NBD URI"
        )
    kinds = [usable for usable in probe() if kind in (None, usable)]
    if not kinds:
        raise UnsupportedError(NOTHING_TO_USE if kind is None else f"this host has no {kind}", hint=WHAT_TO_INSTALL)
    address = NbdUri.parse(uri) if isinstance(uri, str) else uri
    wish = Wish(address, size, name, directory, sector, read_only)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _first(kinds, wish)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _first(kinds: list[str], wish: Wish) -> Node:
    """The node of the first way that works; one that only seemed to be there is passed over."""
    while True:
        front_end = _by_kind(kinds.pop(0))
        try:
            return front_end.connect(wish)
        except UnsupportedError:
            if not kinds:
                raise


def disconnect(state: dict[str, Any]) -> None:
    """Take a node apart, last step of making it first; one that is gone already is no error.

    What was written to the node is flushed to the export before. Raises BusyError, naming the holder, while it is
    mounted or open.
    """
    if state["boot"] == process.boot_id():
        _by_kind(state["kind"]).disconnect(state)
    shutil.rmtree(state["directory"], ignore_errors=True)


def abandon(state: dict[str, Any]) -> None:
    """Take a node apart under whoever uses it: what they read and write fails from now on.

    A node that is mounted may stay visible until it is unmounted.
    """
    if state["boot"] == process.boot_id():
        _by_kind(state["kind"]).abandon(state)
    shutil.rmtree(state["directory"], ignore_errors=True)


def is_present(state: dict[str, Any]) -> bool:
    """Whether the node still is there, and is the one that `connect` made and not another of the same name."""
    return bool(state["boot"] == process.boot_id()) and _by_kind(state["kind"]).is_present(state)


def reconnect(state: dict[str, Any]) -> None:
    """Give the node a new connection after its server was restarted, under whoever uses it.

    Raises UnsupportedError if this kind of node cannot do that, StateError if the node is another's by now, and what
    connecting to the server raises.
    """
    _by_kind(state["kind"]).reconnect(state)


def _by_kind(kind: str) -> _FrontEnd:
    try:
        return _BY_KIND[kind]
    except KeyError:
        raise StasisError(f"unknown kind of block device node: {kind}") from None
