# SPDX-License-Identifier: Apache-2.0
"""epoll_ctl(2) with data of our choice, which select.epoll does not take."""

import ctypes
import struct

from stasis.linux import libc

__all__ = ["add"]

EPOLL_CTL_ADD = 1  # include/uapi/linux/eventpoll.h
EVENT = struct.Struct("<IQ")
"""struct epoll_event, packed on x86-64: events, data."""


def add(epoll: int, fd: int, events: int, data: int) -> None:
    """Watch `fd`; `data` is what epoll_wait(2) returns for it."""
    event = ctypes.create_string_buffer(EVENT.pack(events, data), EVENT.size)
    libc.check(libc.libc.epoll_ctl(epoll, EPOLL_CTL_ADD, fd, event), "epoll_ctl", fd)
