# SPDX-License-Identifier: Apache-2.0
"""File systems at rest while a snapshot is taken, as blksnap and dattobd freeze those on their devices.

Without that an image would lack what programs wrote and the kernel had not sent to the disk yet. A file system that
cannot be frozen does not keep the snapshot from being taken: it is written out before, and its image is then that of a
power cut at this moment. A watchdog thaws in any case.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stasis.errors import StasisError
from stasis.linux import freeze

if TYPE_CHECKING:
    from stasis.live.stack import Stack

__all__ = ["file_systems_at_rest"]

LONGEST_SECONDS = 10.0
"""A take holds its devices for a fraction of a second; its preparation may have to wait for a slow disk."""


@contextlib.contextmanager
def file_systems_at_rest(nodes: Sequence[str], own: Sequence[str]) -> Iterator[list[str]]:
    """Freeze what is mounted on the nodes while the block runs; gives the mount points that are frozen.

    `own` are directories that the take itself writes to: nothing is frozen if one lies on a node.
    """
    with contextlib.ExitStack() as stack:
        yield _freeze(stack, nodes, own)


def _freeze(stack: contextlib.ExitStack, nodes: Sequence[str], own: Sequence[str]) -> list[str]:
    numbers = [os.stat(node).st_rdev for node in nodes if os.path.exists(node)]
    if not numbers:
        return []
    from stasis.live.freezer import Freezer
    from stasis.live.stack import Stack

    try:
        above = stack.enter_context(Stack(numbers))
        _write_out(above)
        if not above.file_systems or any(above.holds(path) for path in own):
            return []
        freezer = stack.enter_context(Freezer(above.file_systems))
        resting = freezer.freeze(LONGEST_SECONDS).resting
    except StasisError:
        return []
    stack.callback(freezer.thaw_quietly)
    return [file_system.target for file_system in resting]


def _write_out(above: Stack) -> None:
    for file_system in above.file_systems:
        with contextlib.suppress(OSError):  # the freeze meets the same error, and the image shows what is on the disk
            freeze.sync(file_system.fd)
