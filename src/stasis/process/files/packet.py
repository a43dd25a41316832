# SPDX-License-Identifier: Apache-2.0
"""Packet sockets (packet(7)): bound to their interface and protocol again, with their options, groups and fanout.
Packets that nobody read are lost, as any packet may be. One with a ring in memory is refused."""

from __future__ import annotations

import os
import socket
import stat
import struct
from typing import TYPE_CHECKING

from stasis.errors import StateError
from stasis.linux.sockdiag import PacketSocket, packet_sockets
from stasis.process.files.descriptor import duplicate, owner, set_flags
from stasis.process.files.kind import FileKind
from stasis.process.files.sockopts import options_of, set_options
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.sockets import PacketMclist, PacketSockEntry
from stasis.process.spaces import everywhere

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.kind import Looking, Opened, Saving

__all__ = ["PacketSockets"]

SOL_PACKET = 263
# include/uapi/linux/if_packet.h
ADD_MEMBERSHIP, COPY_THRESH, AUXDATA, ORIGDEV, VERSION, RESERVE, LOSS, VNET_HDR, TIMESTAMP, FANOUT = (
    1, 7, 8, 9, 10, 12, 14, 15, 17, 18,
)  # fmt: skip
PDI_AUXDATA, PDI_ORIGDEV, PDI_VNETHDR, PDI_LOSS = 2, 4, 8, 16  # include/uapi/linux/packet_diag.h
MEMBERSHIP = struct.Struct("=iHH8s")  # struct packet_mreq
TYPES = (socket.SOCK_RAW, socket.SOCK_DGRAM)
NO_FANOUT = 0xFFFFFFFF


class PacketSockets(FileKind):
    type = FdTypes.PACKETSK
    field = "psk"

    def __init__(self, options: object) -> None:
        super().__init__(options)  # type: ignore[arg-type]
        self._known: dict[int, PacketSocket] | None = None

    def claims(self, descriptor: Descriptor) -> bool:
        if descriptor.kind != stat.S_IFSOCK:
            return False
        with _opened(descriptor) as sock:
            return sock.family == socket.AF_PACKET

    def _found(self, descriptor: Descriptor) -> PacketSocket | None:
        if self._known is None:
            self._known = {}
            for _ in everywhere("net"):
                self._known.update(packet_sockets())
        return self._known.get(descriptor.status.st_ino)

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        found = self._found(descriptor)
        if found is None:
            looking.findings.add(descriptor.pid, descriptor.where, "the kernel does not tell about it here")
        elif found.has_ring:
            looking.findings.add(descriptor.pid, descriptor.where, "it has a ring in memory, which is not supported")
        elif found.type not in TYPES:
            looking.findings.add(descriptor.pid, descriptor.where, "it is of an obsolete type")

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        found = self._found(descriptor)
        assert found is not None, "check found it"
        with _opened(descriptor) as sock:
            entry = PacketSockEntry(
                id=number, type=found.type, protocol=socket.htons(found.protocol), flags=descriptor.flags,
                ifindex=found.interface, fown=owner(fd), opts=options_of(sock), version=found.version,
                reserve=found.reserve, aux_data=bool(found.flags & PDI_AUXDATA),
                orig_dev=bool(found.flags & PDI_ORIGDEV), vnet_hdr=bool(found.flags & PDI_VNETHDR),
                loss=bool(found.flags & PDI_LOSS), timestamp=found.timestamp, copy_thresh=found.copy_threshold,
                mclist=[PacketMclist(index=index, type=kind, addr=address) for index, kind, address in found.groups],
            )  # fmt: skip
        if found.fanout is not None:
            entry.fanout = found.fanout
        return FileEntry(type=FdTypes.PACKETSK, id=number, psk=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: PacketSockEntry = self.message_of(entry)
        if found.type not in TYPES or found.rx_ring is not None or found.tx_ring is not None:
            raise damaged(opened.images.file_path("files"), 0, f"packet socket {found.id} cannot be restored")
        everywhere = 0 if found.ifindex else found.protocol & 0xFFFF  # of all interfaces
        with socket.socket(socket.AF_PACKET, found.type | socket.SOCK_CLOEXEC, everywhere) as sock:
            set_options(sock, found.opts)
            _set(sock, found)
            try:
                self._bind(sock, found)
            except OSError as error:
                raise StateError(f"the network interface {found.ifindex}, which a packet socket was bound to, "
                                 f"cannot be had: {error.strerror}", hint="restore where it is there",
                                 errno=error.errno or 0) from error  # fmt: skip
            set_flags(sock.fileno(), found.flags)
            return os.dup(sock.fileno())

    def _bind(self, sock: socket.socket, found: PacketSockEntry) -> None:
        if found.ifindex:
            sock.bind((socket.if_indextoname(found.ifindex), socket.ntohs(found.protocol & 0xFFFF)))
        for group in found.mclist:
            content = MEMBERSHIP.pack(group.index, group.type, len(group.addr), group.addr)
            sock.setsockopt(SOL_PACKET, ADD_MEMBERSHIP, content)
        if found.fanout != NO_FANOUT:
            sock.setsockopt(SOL_PACKET, FANOUT, struct.pack("=I", found.fanout))


def _set(sock: socket.socket, found: PacketSockEntry) -> None:
    values = {VERSION: found.version, RESERVE: found.reserve, AUXDATA: found.aux_data, ORIGDEV: found.orig_dev,
              VNET_HDR: found.vnet_hdr, LOSS: found.loss, TIMESTAMP: found.timestamp,
              COPY_THRESH: found.copy_thresh}  # fmt: skip
    for name, value in values.items():
        if value:
            sock.setsockopt(SOL_PACKET, name, int(value))


def _opened(descriptor: Descriptor) -> socket.socket:
    return socket.socket(fileno=duplicate(descriptor))
