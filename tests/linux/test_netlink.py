# SPDX-License-Identifier: Apache-2.0
"""Generic netlink against the one family that every kernel has: the controller itself."""

from __future__ import annotations

import errno
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.linux import nbd_netlink, netlink
from stasis.linux.netlink import GENL_ID_CTRL, GenericNetlink


def test_controller_knows_itself() -> None:
    with GenericNetlink() as kernel:
        assert kernel.family("nlctrl") == GENL_ID_CTRL
        assert kernel.family("nlctrl") == GENL_ID_CTRL  # answers belong to their request


def test_unknown_family_is_none() -> None:
    with GenericNetlink() as kernel:
        assert kernel.family("no-such-family") is None


def test_refusal_is_the_kernels_errno() -> None:
    with GenericNetlink() as kernel, pytest.raises(OSError, match="netlink command 255") as caught:
        kernel.request(GENL_ID_CTRL, 1, 255, b"")
    assert caught.value.errno == errno.EOPNOTSUPP


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=50)))
def test_attributes_are_read_as_written(wanted: dict[int, bytes]) -> None:
    content = b"".join(netlink.attribute(kind, payload) for kind, payload in wanted.items())
    assert len(content) % 4 == 0
    assert netlink.attributes(content) == wanted


@given(st.binary(max_size=100))
def test_garbage_ends(data: bytes) -> None:
    assert sum(map(len, netlink.attributes(data).values())) <= len(data)


def test_nested_attributes_keep_their_type() -> None:
    inner = netlink.u32(1, 7) + netlink.string(2, "name")
    found = netlink.attributes(netlink.nested(5, inner))
    assert netlink.attributes(found[5]) == {1: b"\7\0\0\0", 2: b"name\0"}


def test_a_device_that_is_not_there_is_not_connected() -> None:
    assert not nbd_netlink.connected(1 << 20)
    assert nbd_netlink.backend(1 << 20) is None


def test_socket_that_only_we_hold_is_not_adopted_and_one_that_another_holds_is() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        other = ours.dup()  # stands for the kernel's reference
        with other:
            assert nbd_netlink.is_adopted(ours)
            assert ours.fileno() == -1
        ours, more = socket.socketpair()
        with more:
            assert not nbd_netlink.is_adopted(ours)
