# SPDX-License-Identifier: Apache-2.0
"""systemd's two small protocols: listening sockets that are passed in, and telling that the service is ready.

Sources: sd_listen_fds(3) and sd_notify(3). The first is also how `nbdinfo [ command ]` starts a server.
"""

from __future__ import annotations

import os
import socket

__all__ = ["SD_LISTEN_FDS_START", "listen_fds", "notify"]

SD_LISTEN_FDS_START = 3


def listen_fds() -> list[tuple[int, str]]:
    """The descriptors passed to this very process, as (descriptor, name); empty when there are none.

    The variables are taken out of the environment, so that no child believes they are meant for it. Raises
    ValueError when they are not numbers.
    """
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not pid or not count or int(pid) != os.getpid():
        return []
    fds = range(SD_LISTEN_FDS_START, SD_LISTEN_FDS_START + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    names += ["unknown"] * (len(fds) - len(names))
    return [(fd, name or "unknown") for fd, name in zip(fds, names, strict=False)]


def notify(state: str) -> bool:
    """Send e.g. "READY=1" to the service manager; False when there is none. Raises OSError."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), address)
    return True
