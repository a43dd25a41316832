# SPDX-License-Identifier: Apache-2.0
"""Mount namespaces that are made by a child of the first process, which need not come back from them: who is in a user
namespace cannot. What it hands over are descriptors."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from stasis.errors import StasisError
from stasis.linux import process
from stasis.process.namespaces.mounting import Tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stasis.process.images.imageset import ImageSet
    from stasis.process.namespaces.own import Settings

__all__ = ["make_elsewhere"]

LONGEST = 1 << 16
DONE = b"{}"


def make_elsewhere(numbers: Sequence[int], images: ImageSet, settings: Settings) -> dict[int, tuple[int, int]]:
    """Have mount namespaces with the tables of an image set. By number: a descriptor for each, and one for its root.
    StasisError where that fails; nothing is left of them then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        child = os.fork()
        if child == 0:
            ours.close()
            _make(numbers, images, settings, theirs)
        theirs.close()
        found: dict[int, tuple[int, int]] = {}
        try:
            while len(found) < len(numbers):
                told, fds, _, _ = socket.recv_fds(ours, LONGEST, 2)
                if not told:
                    raise StasisError("the mount namespaces were not made")
                if told != DONE:
                    raise StasisError.from_dict(json.loads(told))
                found[numbers[len(found)]] = fds[0], fds[1]
        finally:
            os.waitpid(child, 0)
    return found


def _make(numbers: Sequence[int], images: ImageSet, settings: Settings, tell: socket.socket) -> NoReturn:
    """The life of that child."""
    try:
        process.set_parent_death_signal(signal.SIGKILL)
        for fds in Tables(numbers, images, settings).make().values():
            socket.send_fds(tell, [DONE], fds)
    except StasisError as error:
        _tell(tell, error)
    except OSError as error:
        _tell(tell, StasisError(f"the mount namespaces cannot be made: {error}", errno=error.errno or 0))
    except BaseException as error:  # told and ended: there is nobody to raise it to
        print(f"stasis: {error!r} in a mount namespace", file=sys.stderr, flush=True)
    os._exit(0)


def _tell(tell: socket.socket, error: StasisError) -> None:
    tell.send(json.dumps({"message": str(error), **error.as_dict()}).encode())
