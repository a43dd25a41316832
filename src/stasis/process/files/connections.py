# SPDX-License-Identifier: Apache-2.0
"""The TCP connections of a tree while it is dumped: in repair mode and with their packets dropped, or as they were.

Which ones are is noted in memory that the guardian shares, before they are touched: should the dumper die, it lets them
live again. After a dump that ends the tree the lock stays until the restore takes it away: a packet that found no
socket would be answered with a reset, and the other end would take the connection for broken. The table has the name
that criu looks for, so that its restore takes it away as well.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable
from itertools import takewhile
from types import TracebackType
from typing import TYPE_CHECKING, Self

from stasis.linux.pidfd import Pidfd

if TYPE_CHECKING:
    import socket

    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.opening import FileSet

__all__ = ["NFTABLES", "SKIP", "Connections", "let_all_live", "table_name", "why_no_lock"]

IPTABLES, NFTABLES, SKIP = 0, 1, 2
"""Values of the inventory's network_lock_method."""
SLOTS = 1 << 16
CAP_NET_ADMIN = 12


class _Slot(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_int32), ("fd", ctypes.c_int32), ("reuse", ctypes.c_int32)]


def table_name(run_id: str) -> str:
    """The name of the table that drops packets, by the id in the inventory. CRIU has 31 bytes for "inet" and name
    together, and takes away the table with what fits."""
    return f"CRIU-{run_id[:21]}"


class Connections:
    """Those that are held; a context manager that lets them live again. To be made before the guardian is forked."""

    def __init__(self, method: str = "nftables") -> None:
        raw = os.urandom(16).hex()
        self.run_id = "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))
        self.method = SKIP if method == "skip" else NFTABLES
        self.count = 0
        self._memory: mmap.mmap | None = mmap.mmap(-1, SLOTS * ctypes.sizeof(_Slot))
        self._slots = (_Slot * SLOTS).from_buffer(self._memory)

    def hold(
        self, descriptor: Descriptor, sock: socket.socket, ends: tuple[str, int, str, int], *, reuse: bool
    ) -> None:
        """Drop the packets of a connection, then put it into repair mode. `reuse`: its SO_REUSEADDR."""
        from stasis.linux import nftables  # only dumps with connections pay for it
        from stasis.process.files.tcp import begin_repair

        if self.count >= SLOTS:
            raise OSError(errno.E2BIG, f"more than {SLOTS} TCP connections cannot be dumped at once")
        slot = self._slots[self.count]
        slot.fd, slot.reuse = descriptor.fd, reuse
        slot.pid = descriptor.pid  # last: from here on the guardian believes it
        self.count += 1
        if self.method == NFTABLES:
            if self.count == 1:
                nftables.create_drop_table(table_name(self.run_id))
            nftables.drop(table_name(self.run_id), [ends])
        begin_repair(sock)

    def keep(self) -> None:
        """The tree ends: its connections are in the images, and their packets are to be dropped until they are back."""
        for slot in self._slots[: self.count]:
            slot.pid = 0
        self.count = 0

    def release(self) -> None:
        """Let all live again: their own packets, and those of others."""
        held = list(takewhile(lambda slot: slot.pid, self._slots))
        for slot in held:
            _release(slot)
        if held and self.method == NFTABLES:
            _unlock(table_name(self.run_id))
        self.keep()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.count:
            self.release()


def _release(slot: _Slot) -> None:
    from stasis.process.files.tcp import end_repair

    try:
        with Pidfd(slot.pid) as pidfd:
            fd = pidfd.get(slot.fd)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EBADF):
            raise
        return  # the process ended meanwhile
    import socket

    with socket.socket(fileno=fd) as sock:
        end_repair(sock, reuse=bool(slot.reuse))


def _unlock(name: str) -> None:
    from stasis.linux import nftables

    try:
        nftables.delete_table(name)
    except FileNotFoundError:
        return  # it was not there yet


def why_no_lock(method: str) -> tuple[str, str]:
    """Why connections cannot be held by this process, and the option that gets around it; ("", "") where they can."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    if not int(fields["CapEff"], 16) >> CAP_NET_ADMIN & 1:
        return "to keep a TCP connection needs CAP_NET_ADMIN", "--tcp close"
    if method == "skip":
        return "", ""
    from stasis.linux import nftables

    try:
        nftables.tables()
    except OSError as error:
        return f"its packets cannot be dropped meanwhile: {error.strerror}", "--network-lock skip"
    return "", ""


def let_all_live(files: FileSet, tables: Iterable[tuple[int, int]]) -> None:
    """The processes are all there: let the connections of `tables`, (pid, descriptor table) of each, live again."""
    from stasis.process.images.schema.files import FdTypes

    images = files.images
    places: dict[int, tuple[int, int]] = {}
    for pid, files_id in tables:
        for entry in images.messages("fdinfo", files_id):
            if entry.type == FdTypes.INETSK:
                places.setdefault(entry.id, (pid, entry.fd))
    if not places:
        return
    import socket

    from stasis.process.files.inet import is_connection, let_live
    from stasis.process.files.iptables import drop_rules

    method = images.inventory.network_lock_method or IPTABLES
    for number, (pid, fd) in places.items():
        found = files.entry(number).isk
        if found is not None and is_connection(found) and not files.closes_connections:
            with Pidfd(pid) as pidfd, socket.socket(fileno=pidfd.get(fd)) as sock:
                let_live(sock, found, images)
            if method == IPTABLES:
                drop_rules(found)
    if method == NFTABLES and images.inventory.dump_criu_run_id:
        _unlock(table_name(images.inventory.dump_criu_run_id))
