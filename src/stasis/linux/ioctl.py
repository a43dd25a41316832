# SPDX-License-Identifier: Apache-2.0
"""Numbers of ioctl requests, built as include/uapi/asm-generic/ioctl.h does, and one checked call."""

import ctypes
import fcntl

from stasis.linux import libc

__all__ = ["IO", "IOR", "IOW", "IOWR", "Size", "call", "get"]

Size = int | type[ctypes.Structure]
"""What a request takes or gives: bytes, or the structure whose size they are."""

IOC_NONE = 0
IOC_WRITE = 1
IOC_READ = 2

IOC_TYPESHIFT = 8
IOC_SIZESHIFT = 16
IOC_DIRSHIFT = 30


def _request(direction: int, kind: int | str, number: int, size: Size) -> int:
    code = ord(kind) if isinstance(kind, str) else kind
    length = size if isinstance(size, int) else ctypes.sizeof(size)
    return direction << IOC_DIRSHIFT | length << IOC_SIZESHIFT | code << IOC_TYPESHIFT | number


def IO(kind: int | str, number: int) -> int:
    """A request without an argument, or one of the old ones that do not tell their argument's size."""
    return _request(IOC_NONE, kind, number, 0)


def IOR(kind: int | str, number: int, size: Size) -> int:
    """A request that fills size bytes."""
    return _request(IOC_READ, kind, number, size)


def IOW(kind: int | str, number: int, size: Size) -> int:
    """A request that reads size bytes from the caller."""
    return _request(IOC_WRITE, kind, number, size)


def IOWR(kind: int | str, number: int, size: Size) -> int:
    """A request that reads and fills size bytes."""
    return _request(IOC_READ | IOC_WRITE, kind, number, size)


def call(fd: int, name: str, request: int, argument: int | bytearray | ctypes.Structure = 0) -> int:
    """Issue request on fd; a bytearray or structure is filled in place, also where the request fails.

    Gives what the kernel returned, 0 from most requests. Raises OSError naming request and file.
    """
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as e:
        raise libc.error(e.errno, name, fd) from e


def get(fd: int, name: str, request: int, size: int) -> int:
    """The little-endian unsigned integer of size bytes that request fills."""
    value = bytearray(size)
    call(fd, name, request, value)
    return int.from_bytes(value, "little")
