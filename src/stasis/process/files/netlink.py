# SPDX-License-Identifier: Apache-2.0
"""Netlink sockets: bound to their port and groups again. What a message would have told is gone by the restore, so one
with messages that were not read is refused."""

from __future__ import annotations

import os
import socket
import stat
import struct
from typing import TYPE_CHECKING

from stasis.errors import BusyError
from stasis.process.files.descriptor import duplicate, owner, set_flags
from stasis.process.files.kind import FileKind
from stasis.process.files.sockopts import options_of, set_options
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.sockets import NetlinkSkEntry

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.kind import Looking, Opened, Saving

__all__ = ["NetlinkSockets"]

# include/uapi/linux/netlink.h
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_LIST_MEMBERSHIPS = 270, 1, 9
OPTIONS = {"NETLINK_PKTINFO": 3, "NETLINK_BROADCAST_ERROR": 4, "NETLINK_NO_ENOBUFS": 5, "NETLINK_LISTEN_ALL_NSID": 8,
           "NETLINK_CAP_ACK": 10, "NETLINK_EXT_ACK": 11, "NETLINK_GET_STRICT_CHK": 12}  # fmt: skip
MEMBERSHIP_BYTES = 1024
MOST_GROUPS = MEMBERSHIP_BYTES // 4
HIGHEST_PROTOCOL = 31  # MAX_LINKS
TCP_CLOSE = 7  # the state of one that is not bound, as sock_diag has it


class NetlinkSockets(FileKind):
    type = FdTypes.NETLINKSK
    field = "nlsk"

    def claims(self, descriptor: Descriptor) -> bool:
        if descriptor.kind != stat.S_IFSOCK:
            return False
        with _opened(descriptor) as sock:
            return sock.family == socket.AF_NETLINK

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        with _opened(descriptor) as sock:
            try:
                sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                reason = f"it holds the error {error.strerror!r}, which nobody has heard of yet"
                looking.findings.add(descriptor.pid, descriptor.where, reason)
                return
            looking.findings.add(descriptor.pid, descriptor.where, "messages of the kernel wait in it", passes=True)

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        with _opened(descriptor) as sock:
            for name in _lost_options(sock):
                where = f"process {descriptor.pid}: {descriptor.where}"
                saving.warnings.append(f"{where}: its option {name} will not be set")
            port, _ = sock.getsockname()
            peer_port, peer_groups = sock.getpeername()
            entry = NetlinkSkEntry(
                id=number, ino=descriptor.status.st_ino & 0xFFFFFFFF, protocol=sock.proto, state=TCP_CLOSE,
                flags=descriptor.flags, portid=port, groups=_groups(sock), dst_portid=peer_port,
                dst_group=peer_groups, fown=owner(fd), opts=options_of(sock),
            )  # fmt: skip
        return FileEntry(type=FdTypes.NETLINKSK, id=number, nlsk=entry)

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        return f"socket:[{self.message_of(entry).ino}]"

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: NetlinkSkEntry = self.message_of(entry)
        if found.protocol > HIGHEST_PROTOCOL or len(found.groups) > MOST_GROUPS:
            raise damaged(opened.images.file_path("files"), 0, f"socket {found.id} is of an unknown kind")
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, found.protocol) as sock:
            set_options(sock, found.opts)
            if found.portid:
                _bind(sock, found.portid)
            for number, word in enumerate(found.groups):
                for bit in range(32):
                    if word >> bit & 1:
                        sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 32 * number + bit + 1)
            if found.dst_portid or found.dst_group:
                sock.connect((found.dst_portid, found.dst_group))
            set_flags(sock.fileno(), found.flags)
            return os.dup(sock.fileno())


def _opened(descriptor: Descriptor) -> socket.socket:
    return socket.socket(fileno=duplicate(descriptor))


def _lost_options(sock: socket.socket) -> list[str]:
    """Those that are set and that images have no place for."""
    found = []
    for name, number in OPTIONS.items():
        try:
            if sock.getsockopt(SOL_NETLINK, number):
                found.append(name)
        except OSError:
            continue  # an option that this kernel does not know or tell
    return found


def _groups(sock: socket.socket) -> list[int]:
    """Bits of the groups whose messages it gets."""
    raw = sock.getsockopt(SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, MEMBERSHIP_BYTES)
    return list(struct.unpack(f"={len(raw) // 4}I", raw[: len(raw) // 4 * 4]))


def _bind(sock: socket.socket, port: int) -> None:
    try:
        sock.bind((port, 0))
    except OSError as error:
        raise BusyError(f"the netlink port {port}, which a process had, cannot be had: {error.strerror}",
                        hint="restore where it is free", errno=error.errno or 0) from error  # fmt: skip
