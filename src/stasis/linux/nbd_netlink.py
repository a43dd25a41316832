# SPDX-License-Identifier: Apache-2.0
"""The kernel's NBD client by netlink (include/uapi/linux/nbd-netlink.h), since Linux 4.12."""

import contextlib
import errno
import os
import socket
from pathlib import Path

from stasis.linux import netlink
from stasis.linux.netlink import GenericNetlink, nested, string, u32, u64

__all__ = ["available", "backend", "connect", "connected", "disconnect", "is_adopted", "node", "reconfigure"]

NBD_GENL_FAMILY_NAME = "nbd"
NBD_GENL_VERSION = 1

NBD_ATTR_INDEX = 1
NBD_ATTR_SIZE_BYTES = 2
NBD_ATTR_BLOCK_SIZE_BYTES = 3
NBD_ATTR_TIMEOUT = 4
NBD_ATTR_SERVER_FLAGS = 5
NBD_ATTR_CLIENT_FLAGS = 6
NBD_ATTR_SOCKETS = 7
NBD_ATTR_DEAD_CONN_TIMEOUT = 8
NBD_ATTR_DEVICE_LIST = 9
NBD_ATTR_BACKEND_IDENTIFIER = 10

NBD_DEVICE_ITEM = 1
NBD_DEVICE_INDEX = 1
NBD_DEVICE_CONNECTED = 2
NBD_SOCK_ITEM = 1
NBD_SOCK_FD = 1

NBD_CMD_CONNECT = 1
NBD_CMD_DISCONNECT = 2
NBD_CMD_RECONFIGURE = 3
NBD_CMD_STATUS = 5


def _request(command: int, content: bytes) -> list[netlink.Attributes]:
    with GenericNetlink() as kernel:
        family = kernel.family(NBD_GENL_FAMILY_NAME)
        if family is None:
            raise OSError(errno.EAFNOSUPPORT, "the kernel has no NBD client (module nbd)")
        return kernel.request(family, NBD_GENL_VERSION, command, content)


def available() -> bool:
    """Whether the kernel has the family now; its module may still have to be loaded."""
    try:
        with GenericNetlink() as kernel:
            return kernel.family(NBD_GENL_FAMILY_NAME) is not None
    except OSError:
        return False


def node(index: int) -> str:
    return f"/dev/nbd{index}"


def _sockets(sock: socket.socket) -> bytes:
    return nested(NBD_ATTR_SOCKETS, nested(NBD_SOCK_ITEM, u32(NBD_SOCK_FD, sock.fileno())))


def connect(
    sock: socket.socket,
    size: int,
    sector: int,
    server_flags: int,
    *,
    timeout: int,
    dead_timeout: int,
    identifier: str,
) -> int:
    """Make a device of a negotiated connection (simple replies) and return its index; sock may be closed then.

    size and sector are bytes. Requests without an answer for timeout seconds are sent again; without a connection
    they wait dead_timeout seconds for reconfigure() and then fail. identifier (kept since Linux 5.14) must be
    given again to reconfigure(). EPERM without CAP_SYS_ADMIN.
    """
    content = (
        u64(NBD_ATTR_SIZE_BYTES, size)
        + u64(NBD_ATTR_BLOCK_SIZE_BYTES, sector)
        + u64(NBD_ATTR_SERVER_FLAGS, server_flags)
        + u64(NBD_ATTR_TIMEOUT, timeout)
        + u64(NBD_ATTR_DEAD_CONN_TIMEOUT, dead_timeout)
        + string(NBD_ATTR_BACKEND_IDENTIFIER, identifier)
        + _sockets(sock)
    )
    (reply,) = _request(NBD_CMD_CONNECT, content)
    return int.from_bytes(reply[NBD_ATTR_INDEX], "little")


def reconfigure(index: int, sock: socket.socket, identifier: str) -> None:
    """Offer a new connection in place of a dead one.

    The kernel answers success and takes nothing if no connection is dead (nbd_genl_reconfigure() turns ENOSPC
    into 0): ask is_adopted() afterwards. EINVAL if the device is not connected or has another identifier.
    """
    content = u32(NBD_ATTR_INDEX, index) + string(NBD_ATTR_BACKEND_IDENTIFIER, identifier) + _sockets(sock)
    _request(NBD_CMD_RECONFIGURE, content)


def disconnect(index: int) -> None:
    """Take the device off its connection; whoever uses it gets EIO. EINVAL if there is no such device."""
    _request(NBD_CMD_DISCONNECT, u32(NBD_ATTR_INDEX, index))


def connected(index: int) -> bool:
    """Whether the device has a connection configured (which may be dead and wait for another)."""
    try:
        (reply,) = _request(NBD_CMD_STATUS, u32(NBD_ATTR_INDEX, index))
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.ENODEV, errno.EAFNOSUPPORT):
            return False
        raise
    devices = netlink.attributes(reply.get(NBD_ATTR_DEVICE_LIST, b""))
    item = netlink.attributes(devices.get(NBD_DEVICE_ITEM, b""))
    return item.get(NBD_DEVICE_CONNECTED, b"\0")[0] != 0


def backend(index: int) -> str | None:
    """The identifier that the device was connected with; None if there is none or before Linux 5.14."""
    with contextlib.suppress(OSError):
        return Path(f"/sys/block/nbd{index}/backend").read_text().strip()
    return None


def is_adopted(sock: socket.socket) -> bool:
    """Close sock, a unix socket, and tell whether the kernel goes on holding it."""
    inode = os.fstat(sock.fileno()).st_ino
    sock.close()
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    # Num RefCount Protocol Flags Type St Inode Path
    return any(line.split()[6] == str(inode) for line in lines)
