# SPDX-License-Identifier: Apache-2.0
"""Kernel nodes of devices: the daemon's door to `stasis.block.frontend`, imported only where a node is wanted."""

from __future__ import annotations

import logging
from typing import Any

from stasis.daemon.paths import Directories
from stasis.errors import BusyError, StasisError

__all__ = ["abandon", "is_present", "make", "path_of", "reconnect", "remove", "remove_if_unused"]


log = logging.getLogger(__name__)


def make(uri: str, size: int, name: str, directories: Directories) -> dict[str, Any]:
    """Make a block device for an export: what `remove` wants back. Raises UnsupportedError if the host has no way."""
    from stasis.block import frontend

    return frontend.connect(uri, size, name=name, directory=directories.run / "nodes" / name).state


def remove(state: dict[str, Any]) -> None:
    """Take a node apart, in the right order. Raises BusyError while somebody uses it."""
    from stasis.block import frontend

    frontend.disconnect(state)


def abandon(state: dict[str, Any]) -> None:
    """Take the node apart, under whoever uses it if need be: they get I/O errors. Only logs if that fails."""
    from stasis.block import frontend

    try:
        remove(state)
    except BusyError:
        try:
            frontend.abandon(state)
        except (StasisError, OSError) as error:
            log.error("%s is left behind: %s", path_of(state), error)
    except (StasisError, OSError) as error:
        log.error("%s is left behind: %s", path_of(state), error)


def is_present(state: dict[str, Any]) -> bool:
    """Whether the node still is the one that was made."""
    from stasis.block import frontend

    return frontend.is_present(state)


def path_of(state: dict[str, Any] | None) -> str | None:
    """The node's path, None where there is none."""
    return None if state is None else str(state["node"])


def remove_if_unused(state: dict[str, Any]) -> bool:
    """Take the node apart unless somebody uses it; tells whether it is gone."""
    try:
        remove(state)
    except StasisError as error:
        log.warning("%s", error)
        return False
    return True


def reconnect(state: dict[str, Any]) -> bool:
    """Connect the node to the successor of a worker that died, under whoever uses it. Logs and tells if that fails."""
    from stasis.block import frontend

    try:
        frontend.reconnect(state)
    except (StasisError, OSError) as error:
        log.error("%s does not go on: %s", path_of(state), error)
        return False
    return True
