# SPDX-License-Identifier: Apache-2.0
"""The image servers of snapshots: what each is told, where it listens, and what is written down of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from stasis.block.snapshot import SnapshotState
from stasis.daemon import nodes, sockets
from stasis.daemon.child import Child
from stasis.daemon.devices import DeviceKeeper
from stasis.daemon.image import ImageServer
from stasis.daemon.paths import Directories
from stasis.daemon.snapshot import Member, Snapshot, image_export
from stasis.nbd.uri import NbdUri

__all__ = ["ImageKeeper"]


class ImageKeeper:
    """Makes and starts the image servers of all snapshots."""

    def __init__(self, directories: Directories, devices: DeviceKeeper, lock: threading.RLock) -> None:
        self._directories = directories
        self._devices = devices
        self._lock = lock
        self._making = threading.Lock()

    def prestart(self, snapshot: Snapshot) -> None:
        """Have the servers load what they need: the take comes soon."""
        for member in snapshot.members.values():
            self.make(snapshot, member, None).prestart()

    def listen(self, snapshot: Snapshot) -> None:
        """Bind the sockets of the images before anything is taken: it can fail, and clients may queue."""
        tcp = None
        if snapshot.tcp:
            tcp = sockets.parse_address(snapshot.tcp, snapshot.tls_certificates, snapshot.tls_psk)
        for index, member in enumerate(snapshot.members.values()):
            address = None if tcp is None else sockets.nth_port(tcp, index)
            image = snapshot.images.get(member.name) or self.make(snapshot, member, None)
            image.tcp = address
            image.listen()
            member.tcp = image.tcp_address

    def make(self, snapshot: Snapshot, member: Member, tcp: sockets.TcpOptions | None) -> ImageServer:
        """The (not yet started) image server of one member."""
        export = image_export(member.name, snapshot.id)
        image = ImageServer(export, self._directories.nbd_socket(export), self._directories.log_of(export), tcp,
                            lambda child: self._started(snapshot, member, child))
        snapshot.images[member.name] = image
        return image

    def _started(self, snapshot: Snapshot, member: Member, child: Child) -> None:
        """Write down who serves the image, so that a later daemon finds the process and does not start a second."""
        with self._lock:
            member.image_pid, member.image_start_time = child.pid, child.start_time
            if snapshot.state is not SnapshotState.DESTROYING:
                snapshot.save()
            node = member.node
        if node is not None and not nodes.reconnect(node):
            self._give_up(snapshot, member, node)

    def _give_up(self, snapshot: Snapshot, member: Member, node: dict[str, Any]) -> None:
        """A node without a server reads nothing any more; the next who asks for one gets another."""
        with self._lock:
            if member.node is node and snapshot.state is not SnapshotState.DESTROYING:
                self.remove_node(member)
                snapshot.save()

    def start(self, snapshot: Snapshot, member: Member) -> None:
        """Start the server of one member. Raises DaemonError."""
        snapshot.images[member.name].start(*self.configuration(snapshot, member))

    def configuration(self, snapshot: Snapshot, member: Member) -> tuple[dict[str, Any], list[int]]:
        """Configuration of a member's image server, and the descriptors it names."""
        assert snapshot.diff is not None
        device, last = self._devices.find(member.name), member.change_number or 0
        epochs = snapshot.bitmaps or [max(last - 1, 0)]
        configuration = {
            "device": member.name, "path": device.record.path, "uuid": snapshot.id, "size": member.size,
            **device.descriptors, "settings": self._devices.settings().as_dict(),
            "table": str(snapshot.table_path(member.name)), "storage_fd": snapshot.diff.fd,
            "inner_path": str(self._directories.worker_inner(member.name)),
            "map_path": str(self._directories.device(member.name) / "map"),
            "bitmaps": [{"name": f"since-{since}", "since": since} for since in epochs if since <= last],
        }
        return configuration, [fd for fd in (*device.descriptors.values(), snapshot.diff.fd) if fd is not None]

    def node(self, find: Callable[[], tuple[Snapshot, Member]]) -> str:
        """Path of a node for the image that `find` finds, made if there is none.

        It is made without the daemon's lock, since a node reads from its image at once; `find` is called again after.
        Raises what `find` and `nodes.make` raise; nothing is left behind then.
        """
        with self._making:
            with self._lock:
                snapshot, member = find()
                if member.node is not None and nodes.is_present(member.node):
                    return str(member.node["node"])
                self.remove_node(member)
                uri, export = self.uri(snapshot, member), image_export(member.name, snapshot.id)
            state = nodes.make(str(uri), member.size, export, self._directories)
            with self._lock:
                try:
                    snapshot, member = find()
                except BaseException:
                    nodes.abandon(state)
                    raise
                member.node = state
                snapshot.save()
            return str(state["node"])

    def remove_node(self, member: Member) -> None:
        """Take the node of an image apart, whoever uses it."""
        if member.node is not None:
            nodes.abandon(member.node)
            member.node = None

    def uri(self, snapshot: Snapshot, member: Member) -> str | None:
        """URI of an image, None until it is taken."""
        if not snapshot.is_taken:
            return None
        export = image_export(member.name, snapshot.id)
        return str(NbdUri(export=export, socket=str(self._directories.nbd_socket(export))))
