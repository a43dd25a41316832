# SPDX-License-Identifier: Apache-2.0
"""Unix sockets: listening ones, connected ones with what waits in them, datagram sockets.

Both ends of a connection must be in the tree. A connection that was accepted is made through its listener again, so
that both ends have their names; one without names is a pair. Descriptors on their way through a socket are files like
any other.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

from stasis.errors import StateError
from stasis.linux.sockdiag import TCP_LISTEN, UnixSocket, unix_sockets
from stasis.process.files import queues
from stasis.process.files.descriptor import Descriptor, descriptor_of, duplicate, owner, set_flags
from stasis.process.files.kind import FileKind, Looking, Opened, Saving
from stasis.process.files.sockopts import options_of, set_options
from stasis.process.files.unixnames import bind, directory_of, file_perms, mount_of_name, reason_against, standing
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.sockets import ScmEntry, SkPacketEntry, SkShutdown, UnixSkEntry
from stasis.process.spaces import everywhere

if TYPE_CHECKING:
    from stasis.process.files.options import FileOptions

__all__ = ["UnixSockets"]

CONNECTING = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
TYPES = (*CONNECTING, socket.SOCK_DGRAM)
GONE = "its other end is a socket outside the tree"


class UnixSockets(FileKind):
    type = FdTypes.UNIXSK
    field = "usk"

    def __init__(self, options: FileOptions) -> None:
        super().__init__(options)
        self._all: dict[int, UnixSocket] | None = None
        self._waiting: list[tuple[Descriptor, int]] = []
        self._held: list[int] = []
        self._made: dict[int, int] = {}
        self._entries: dict[int, UnixSkEntry] | None = None

    @property
    def sockets(self) -> dict[int, UnixSocket]:
        """All that there are while the tree stands still."""
        if self._all is None:
            self._all = {}
            for _ in everywhere("net"):
                self._all.update(unix_sockets())
        return self._all

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.kind == stat.S_IFSOCK and descriptor.status.st_ino in self.sockets

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        found = self.sockets[descriptor.status.st_ino]
        if found.state == TCP_LISTEN and found.waiting:
            looking.findings.add(descriptor.pid, descriptor.where, "connections wait in it that were not accepted",
                                 passes=True)  # fmt: skip
        if reason := reason_against(found, descriptor):
            looking.findings.add(descriptor.pid, descriptor.where, reason)
        self._check_queue(descriptor, found, looking)

    def _check_queue(self, descriptor: Descriptor, found: UnixSocket, looking: Looking) -> None:
        """Look at the descriptors that wait in it."""
        if found.state == TCP_LISTEN or not found.waiting:
            return
        known = {(one.status.st_dev, one.status.st_ino) for one in looking.descriptors}
        with _opened(descriptor) as sock:
            for _, fds in queues.packets(sock):
                for fd in fds:
                    inner = descriptor_of(os.getpid(), fd)
                    self._held.append(fd)
                    if (inner.status.st_dev, inner.status.st_ino) not in known:
                        looking.look_at(inner)

    def check_all(self, looking: Looking) -> None:
        ours = {one.status.st_ino for one in looking.descriptors}
        for descriptor in looking.descriptors:
            found = self.sockets.get(descriptor.status.st_ino) if descriptor.kind == stat.S_IFSOCK else None
            if found is not None and found.peer and found.peer not in ours and not self._is_outside(found):
                looking.findings.add(descriptor.pid, descriptor.where, GONE, "--ext-unix-sk")
        self._release()

    def _is_outside(self, found: UnixSocket) -> bool:
        """Whether the user said so of a socket, or of its other end."""
        named = {f"unix[{found.inode}]", f"unix[{found.peer}]"}
        return self.options.external_unix or bool(named & self.options.outside)

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        found = self.sockets[descriptor.status.st_ino]
        self._waiting.append((descriptor, number))
        directory = directory_of(found, descriptor)
        with socket.socket(fileno=os.dup(fd)) as sock:
            entry = UnixSkEntry(
                id=number, ino=found.inode, type=found.type, state=found.state, flags=descriptor.flags, uflags=0,
                backlog=found.backlog if found.state == TCP_LISTEN else 0, peer=found.peer, fown=owner(fd),
                opts=options_of(sock), name=found.name, name_dir=directory,
                file_perms=file_perms(found, descriptor, directory), mnt_id=mount_of_name(found, descriptor, directory),
                shutdown=SkShutdown(found.shutdown) if found.shutdown else None,
            )  # fmt: skip
        return FileEntry(type=FdTypes.UNIXSK, id=number, usk=entry)

    def finish(self, saving: Saving) -> None:
        """Write what waits in the sockets; sockets that are found there are appended to the list meanwhile."""
        for descriptor, number in self._waiting:
            if self.sockets[descriptor.status.st_ino].state != TCP_LISTEN:
                with _opened(descriptor) as sock:
                    for data, fds in queues.packets(sock):
                        self._held.extend(fds)
                        rights = [saving.number_of(descriptor_of(os.getpid(), fd)) for fd in fds]
                        scm = [ScmEntry(type=socket.SCM_RIGHTS, rights=rights)] if rights else []
                        head = SkPacketEntry(id_for=number, length=len(data), scm=scm)
                        saving.out.image("sk-queues").append(head, data)

    def saved(self) -> None:
        self._release()

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        return f"socket:[{self.message_of(entry).ino}]"

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: UnixSkEntry = self.message_of(entry)
        self._check_entry(found, opened)
        if found.ino in self._made:
            return self._made.pop(found.ino)
        peer = self._by_inode(opened).get(found.peer)
        if found.peer and peer is None:
            raise StateError(f"the other end of the unix socket {found.ino} was outside of what was dumped",
                             hint=f"give a descriptor for it: --inherit-fd fd[N]:socket:[{found.ino}]")  # fmt: skip
        if found.type in CONNECTING and found.state != TCP_LISTEN and (found.peer or found.state == 1):
            return self._connected(found, peer, opened)
        if peer is not None and peer.peer == found.ino:
            return self._pair(found, peer)
        return self._single(found, opened)

    def _check_entry(self, found: UnixSkEntry, opened: Opened) -> None:
        if found.type not in TYPES:
            raise damaged(opened.images.file_path("files"), 0, f"there is no unix socket of the type {found.type}")

    def _by_inode(self, opened: Opened) -> dict[int, UnixSkEntry]:
        if self._entries is None:
            messages = opened.images.messages("files")
            self._entries = {entry.usk.ino: entry.usk for entry in messages if entry.usk is not None}
        return self._entries

    def _single(self, found: UnixSkEntry, opened: Opened) -> int:
        with socket.socket(socket.AF_UNIX, found.type) as sock:
            if found.name:
                bind(sock, found, opened)
            if found.state == TCP_LISTEN:
                sock.listen(found.backlog)
            return os.dup(sock.fileno())

    def _pair(self, found: UnixSkEntry, peer: UnixSkEntry | None) -> int:
        """Two ends that know each other and have no names; without a `peer` the other one is closed in the end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, found.type)
        self._made[peer.ino if peer else -found.ino] = theirs.detach()
        return ours.detach()

    def _connected(self, found: UnixSkEntry, peer: UnixSkEntry | None, opened: Opened) -> int:
        entries = self._by_inode(opened).values()
        listeners = {(one.name, one.name_dir): one for one in entries if one.state == TCP_LISTEN}
        for server, client in ((found, peer), (peer, found)):
            if server is not None and (server.name, server.name_dir) in listeners:
                return self._accepted(found, server, client, opened, listeners[server.name, server.name_dir].id)
        return self._pair(found, peer)

    def _accepted(
        self, found: UnixSkEntry, server: UnixSkEntry, client: UnixSkEntry | None, opened: Opened, listener: int
    ) -> int:
        with socket.socket(socket.AF_UNIX, found.type) as theirs, _copy(opened.open(listener)) as listening:
            with standing(server, opened):
                theirs.connect(listening.getsockname())
            accepted, _ = listening.accept()
            ends = {server.ino: accepted.detach(), (client.ino if client else -server.ino): os.dup(theirs.fileno())}
        mine = ends.pop(found.ino)
        self._made.update(ends)
        return mine

    def connect(self, opened: Opened) -> None:
        numbers = opened.numbers(FdTypes.UNIXSK)
        for number in numbers:
            self._connect_datagrams(opened.entry(number).usk, opened)
        self._fill(opened)
        for number in opened.numbers(FdTypes.UNIXSK):
            found = self.message_of(opened.entry(number))
            with _copy(opened.open(number)) as sock:
                set_options(sock, found.opts)
                if found.shutdown and found.type in TYPES:
                    sock.shutdown(found.shutdown - 1)
            set_flags(opened.open(number), found.flags)

    def _connect_datagrams(self, found: UnixSkEntry | None, opened: Opened) -> None:
        """To a peer with a name that is not connected to it in turn."""
        if found is None or found.type != socket.SOCK_DGRAM or not found.peer:
            return
        peer = self._by_inode(opened).get(found.peer)
        if peer is not None and peer.peer != found.ino:
            ends = _copy(opened.open(found.id)), _copy(opened.open(peer.id))
            with ends[0] as sock, ends[1] as other, standing(peer, opened):
                sock.connect(other.getsockname())

    def _fill(self, opened: Opened) -> None:
        try:
            image = opened.images.image("sk-queues")
        except FileNotFoundError:
            return
        with image:
            for record in image:
                packet = record.message
                assert isinstance(packet, SkPacketEntry)
                target = opened.entry(packet.id_for).usk
                if target is None:
                    continue  # an inet socket's
                fds = [opened.open(number) for scm in packet.scm for number in scm.rights]
                with self._sender(target, opened) as sock:
                    queues.send(sock, image.read(record.parts[0]), fds)

    def _sender(self, target: UnixSkEntry, opened: Opened) -> socket.socket:
        """A socket that what is sent on lands in `target`."""
        opened.open(target.id)
        if -target.ino in self._made:
            return _copy(self._made[-target.ino])
        peer = self._by_inode(opened).get(target.peer)
        if peer is not None and peer.peer == target.ino:
            return _copy(opened.open(peer.id))
        with _copy(opened.open(target.id)) as receiver, opened.inside("net", target.ns_id):
            sender = socket.socket(socket.AF_UNIX, target.type)
            with standing(target, opened):
                sender.connect(receiver.getsockname())
        return sender

    def done(self, opened: Opened) -> None:
        for fd in self._made.values():
            os.close(fd)
        self._made.clear()


def _opened(descriptor: Descriptor) -> socket.socket:
    return socket.socket(fileno=duplicate(descriptor))


def _copy(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))
