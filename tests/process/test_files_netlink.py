# SPDX-License-Identifier: Apache-2.0
"""Netlink sockets and descriptors of namespaces."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import pytest

from tests.process.cycles import cycle, findings_of

pytestmark = pytest.mark.root

NETLINK_ROUTE, NETLINK_KOBJECT_UEVENT = 0, 15
SOL_NETLINK, ADD_MEMBERSHIP, LIST_MEMBERSHIPS = 270, 1, 9
RTNLGRP_PHONET_IFADDR, RTNLGRP_MPLS_ROUTE = 21, 27
UNUSED = 1 << 2
"""Groups that nobody speaks to: a message that waits is a reason not to dump, and other tests make devices."""
RTM_GETLINK_DUMP = (20).to_bytes(4, "little") + b"\x12\x00" + b"\x01\x03" + bytes(12)


def test_port_and_groups(tmp_path: Path) -> None:
    def set_up() -> tuple[int, int, int]:
        bound = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
        bound.bind((0x123457, 0))
        for group in (RTNLGRP_PHONET_IFADDR, RTNLGRP_MPLS_ROUTE):
            bound.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)
        bound.setblocking(False)
        connected = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
        connected.bind((0, UNUSED))
        return bound.detach(), connected.getsockname()[0], connected.detach()

    def verify(state: tuple[int, int, int]) -> None:
        bound, port, connected = state
        with socket.socket(fileno=bound) as sock, socket.socket(fileno=connected) as other:
            assert sock.getsockname()[0] == 0x123457
            assert sock.getsockopt(SOL_NETLINK, LIST_MEMBERSHIPS, 64)[:4] == b"\0\0\x10\x04"
            assert not os.get_blocking(bound)
            sock.setblocking(True)
            sock.settimeout(60)
            sock.send(RTM_GETLINK_DUMP)
            assert len(sock.recv(1 << 16)) > 20
            assert other.getsockname() == (port, UNUSED)

    cycle(tmp_path / "images", set_up, verify)


def test_messages_that_wait_are_named(tmp_path: Path) -> None:
    def set_up() -> int:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
        sock.send(RTM_GETLINK_DUMP)
        return sock.detach()

    (finding,) = findings_of(set_up, tmp_path / "images")
    assert "messages of the kernel wait" in finding.reason


def test_the_namespaces_that_it_lives_in(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        return [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("net", "uts")]

    def verify(fds: list[int]) -> None:
        for fd, name in zip(fds, ("net", "uts"), strict=True):
            assert os.path.samestat(os.fstat(fd), os.stat(f"/proc/self/ns/{name}"))

    cycle(tmp_path / "images", set_up, verify)


def test_another_namespace_is_named(tmp_path: Path) -> None:
    def set_up() -> int:
        before = os.open("/proc/self/ns/uts", os.O_RDONLY)
        libc = ctypes.CDLL(None)
        assert libc.unshare(0x4000000) == 0
        other = os.open("/proc/self/ns/uts", os.O_RDONLY)
        assert libc.setns(before, 0) == 0
        os.close(before)
        return other

    (finding,) = findings_of(set_up, tmp_path / "images")
    assert "does not live in" in finding.reason
