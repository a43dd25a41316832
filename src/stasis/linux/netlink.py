# SPDX-License-Identifier: Apache-2.0
"""Generic netlink (include/uapi/linux/{netlink,genetlink}.h): requests to a kernel family by its name."""

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Self

from stasis.linux import libc

__all__ = ["Attributes", "GenericNetlink", "attribute", "attributes", "nested", "string", "u32", "u64"]

NETLINK_GENERIC = 16
NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLMSG_ERROR = 2
NLA_F_NESTED = 1 << 15
NLA_TYPE_MASK = 0x3FFF

GENL_ID_CTRL = 0x10
GENL_CTRL_VERSION = 1
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2

NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence, port
GENLMSGHDR = struct.Struct("=BBH")  # command, version, reserved
NLATTR = struct.Struct("=HH")  # length with this header, type
ERROR = struct.Struct("=i")
ALIGNMENT = 4
RECEIVE_SIZE = 1 << 16

Attributes = dict[int, bytes]


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    length = NLATTR.size + len(payload)
    return (NLATTR.pack(length, kind) + payload).ljust(_aligned(length), b"\0")


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def string(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, content: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, content)


def attributes(data: bytes) -> Attributes:
    """Payload by type; of several attributes of one type the last."""
    found = {}
    while len(data) >= NLATTR.size:
        length, kind = NLATTR.unpack_from(data)
        found[kind & NLA_TYPE_MASK] = data[NLATTR.size : length]
        data = data[max(_aligned(length), NLATTR.size) :]
    return found


class GenericNetlink:
    """A socket for requests that the kernel answers at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self._sequence = 0

    def family(self, name: str) -> int | None:
        """The number of a family; None if the kernel has none of this name (its module is not loaded)."""
        name_attribute = string(CTRL_ATTR_FAMILY_NAME, name)
        try:
            (reply,) = self.request(GENL_ID_CTRL, GENL_CTRL_VERSION, CTRL_CMD_GETFAMILY, name_attribute)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return None
            raise
        return int.from_bytes(reply[CTRL_ATTR_FAMILY_ID], "little")

    def request(self, family: int, version: int, command: int, content: bytes) -> list[Attributes]:
        """Send a command and return the attributes of each reply. Raises OSError with the kernel's errno."""
        self._sequence += 1
        body = GENLMSGHDR.pack(command, version, 0) + content
        header = NLMSGHDR.pack(NLMSGHDR.size + len(body), family, NLM_F_REQUEST | NLM_F_ACK, self._sequence, 0)
        self._socket.send(header + body)
        replies: list[Attributes] = []
        for kind, data in self._messages():
            if kind == NLMSG_ERROR:
                (code,) = ERROR.unpack_from(data)
                if code:
                    raise libc.error(-code, f"netlink command {command}")
                return replies
            replies.append(attributes(data[GENLMSGHDR.size :]))
        return replies

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        """(type, body) of each message that answers the last request."""
        while True:
            data = self._socket.recv(RECEIVE_SIZE)
            while len(data) >= NLMSGHDR.size:
                length, kind, _, sequence, _ = NLMSGHDR.unpack_from(data)
                if sequence == self._sequence:
                    yield kind, data[NLMSGHDR.size : length]
                data = data[max(_aligned(length), NLMSGHDR.size) :]

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
