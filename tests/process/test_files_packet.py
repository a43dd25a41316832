# SPDX-License-Identifier: Apache-2.0
"""Packet sockets and fanotify."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from stasis.linux import fanotify
from tests.process.cycles import cycle, findings_of

pytestmark = pytest.mark.root

SOL_PACKET, ADD_MEMBERSHIP, RX_RING, AUXDATA, VERSION, RESERVE, FANOUT = 263, 1, 5, 8, 10, 12, 18
TPACKET_V2, PACKET_MR_ALLMULTI = 1, 2
ETH_P_ALL, ETH_P_IP = 3, 0x800
FAN_MODIFY, FAN_OPEN, FAN_OPEN_PERM, FAN_CLASS_CONTENT = 2, 0x20, 0x10000, 4
EVENT = struct.Struct("=IBBHQii")


def test_packet_sockets(tmp_path: Path) -> None:
    def set_up() -> tuple[int, int]:
        bound = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        bound.setsockopt(SOL_PACKET, VERSION, TPACKET_V2)
        bound.setsockopt(SOL_PACKET, RESERVE, 16)
        bound.setsockopt(SOL_PACKET, AUXDATA, 1)
        bound.bind(("lo", ETH_P_IP))
        group = struct.pack("=iHH8s", socket.if_nametoindex("lo"), PACKET_MR_ALLMULTI, 0, b"")
        bound.setsockopt(SOL_PACKET, ADD_MEMBERSHIP, group)
        bound.setsockopt(SOL_PACKET, FANOUT, struct.pack("=I", os.getpid() & 0xFFFF))
        bound.setblocking(False)
        return bound.detach(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)).detach()

    def verify(fds: tuple[int, int]) -> None:
        with socket.socket(fileno=fds[0]) as bound, socket.socket(fileno=fds[1]) as raw:
            assert bound.getsockname()[:2] == ("lo", ETH_P_IP)
            assert (bound.type & 0xF, raw.type & 0xF) == (socket.SOCK_DGRAM, socket.SOCK_RAW)
            assert bound.getsockopt(SOL_PACKET, VERSION) == TPACKET_V2
            assert bound.getsockopt(SOL_PACKET, RESERVE) == 16
            assert bound.getsockopt(SOL_PACKET, AUXDATA) == 1
            assert bound.getsockopt(SOL_PACKET, FANOUT)
            assert not os.get_blocking(fds[0])
            assert raw.getsockname()[1] == ETH_P_ALL
            bound.setblocking(True)
            bound.settimeout(60)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"a packet for us", ("127.0.0.1", 9))
            while b"a packet for us" not in bound.recv(2000):
                pass

    cycle(tmp_path / "images", set_up, verify)


def test_a_ring_is_named(tmp_path: Path) -> None:
    def set_up() -> int:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.setsockopt(SOL_PACKET, RX_RING, struct.pack("=4I", 4096, 4, 2048, 8))
        return sock.detach()

    (finding,) = findings_of(set_up, tmp_path / "images")
    assert "a ring in memory" in finding.reason


def test_fanotify(tmp_path: Path) -> None:
    (tmp_path / "marked").touch()
    (tmp_path / "ignored").touch()

    def set_up() -> int:
        fd = fanotify.fanotify(0, os.O_RDONLY)
        fanotify.mark(fd, str(tmp_path / "marked"), FAN_OPEN | FAN_MODIFY, is_mount=False)
        fanotify.mark(fd, "/sys", FAN_MODIFY, is_mount=True)
        fanotify.mark(fd, str(tmp_path / "ignored"), FAN_OPEN, is_mount=False, ignored=True, flags=0x40)
        os.set_blocking(fd, False)
        return fd

    def verify(fd: int) -> None:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            lines = [line for line in file if line.startswith("fanotify")]
        assert len(lines) == 4
        assert sum("mnt_id:" in line and " mask:2 " in line for line in lines) == 1
        assert sum(" ignored_mask:20 " in line for line in lines) == 1
        (tmp_path / "marked").write_text("x")
        events = [event for event in EVENT.iter_unpack(os.read(fd, 4096)) if event[4] & (FAN_OPEN | FAN_MODIFY)]
        assert events
        for event in events:
            assert os.path.samestat(os.fstat(event[5]), (tmp_path / "marked").stat())

    cycle(tmp_path / "images", set_up, verify)


def test_one_that_decides_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def set_up() -> int:
        fd = fanotify.fanotify(FAN_CLASS_CONTENT, os.O_RDONLY)
        fanotify.mark(fd, str(tmp_path / "file"), FAN_OPEN_PERM, is_mount=False)
        return fd

    found = findings_of(set_up, tmp_path / "images")
    assert [finding.reason for finding in found] == ["it decides about what other processes may do"]
