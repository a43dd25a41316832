# SPDX-License-Identifier: Apache-2.0
"""Tracers of devices with a kernel node: they follow its mounts, and their images are block devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import stasis as api
from stasis.block import frontend
from stasis.datto.cowreader import CowReader
from stasis.datto.layout import Header
from stasis.errors import BusyError, StasisError
from tests.daemon.helpers import MIB, await_true
from tests.live.disks import mounted, tool
from tests.runner import Stasis

pytestmark = [
    pytest.mark.root,
    pytest.mark.tool("mkfs.ext4"),
    pytest.mark.skipif(os.geteuid() == 0 and not frontend.probe(), reason="this host has no way to make a node"),
]


@pytest.fixture
def client(stasis: Stasis) -> Iterator[api.Client]:
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        yield client


@pytest.fixture
def node(stasis: Stasis, client: api.Client, short_dir: Path) -> Iterator[str]:
    disk = short_dir / "disk"
    disk.write_bytes(bytes(24 * MIB))
    node = client.attach(disk, kernel=True).node
    assert node is not None
    tool("mkfs.ext4", "-q", "-F", node)
    yield node
    with api.connect(stasis.run_dir, stasis.state_dir) as client:
        await_true(lambda: _detached(client))


def _detached(client: api.Client) -> bool:
    """A process that was given mounts of its own meanwhile may still have ours."""
    try:
        client.detach("disk")
    except BusyError:
        return False
    return True


def _refusal(client: api.Client, minor: int, cow: Path) -> int:
    with pytest.raises(StasisError) as caught:
        client.datto_to_snapshot(minor, cow)
    return caught.value.errno


def _header(path: Path) -> Header:
    return Header.unpack(path.read_bytes()[:64], str(path))


def _becomes(client: api.Client, state: str) -> None:
    await_true(lambda: client.datto_list()[0].state_name == state)


def _comes_to_rest(client: api.Client, state: str, cow: Path) -> None:
    """What an unmount writes late may end a rest once; each look tells what the daemon has heard of by then."""
    await_true(lambda: all(client.datto_list()[0].state_name == state and _header(cow).is_clean for _ in range(5)))


def test_it_is_dormant_while_nobody_has_it_mounted(client: api.Client, node: str, short_dir: Path, minor: int) -> None:
    cow, target = short_dir / "cow", short_dir / "mnt"
    with mounted(node, target):
        client.datto_setup([(minor, node, cow)])
        client.datto_list()  # it has been seen mounted
        (target / "file").write_bytes(os.urandom(100000))
        tool("mount", "-o", "remount,ro", target)
        _becomes(client, "dormant snapshot")
        assert _header(cow).is_clean
        tool("mount", "-o", "remount,rw", target)
        _becomes(client, "active snapshot")
        assert not _header(cow).is_clean
        client.datto_to_incremental(minor)
    _comes_to_rest(client, "dormant incremental", cow)
    assert _header(cow).changed_blocks > 20
    with pytest.raises(StasisError) as caught:
        client.datto_to_snapshot(minor, short_dir / "cow1")
    assert caught.value.errno == errno.EINVAL
    with open(node, "r+b") as file:  # no mount tells of this
        file.write(b"behind the mounts")
        os.fsync(file.fileno())
    with mounted(node, target):
        _becomes(client, "active incremental")
        client.datto_to_snapshot(minor, short_dir / "cow1")
        with CowReader(str(cow), 24 * MIB) as reader:
            assert next(reader.extents())[0] == 0
    _comes_to_rest(client, "dormant snapshot", short_dir / "cow1")
    client.datto_destroy(minor)
    assert _header(short_dir / "cow1").is_clean
    assert client.datto_list() == []


def test_the_image_is_a_block_device_that_can_be_mounted(stasis: Stasis, client: api.Client, node: str,
                                                         short_dir: Path, minor: int) -> None:
    link = f"/dev/datto{minor}"
    with mounted(node, short_dir / "mnt") as target:
        (target / "file").write_text("old")  # in the page cache; the freeze writes it out
        client.datto_setup([(minor, node, short_dir / "cow")])
        image = client.datto_info(minor).node
        assert image is not None
        name = link if os.path.islink(link) and os.readlink(link) == image else image
        (target / "file").write_text("new")
        with mounted(name, short_dir / "image", "-o", "ro,noload") as inside:
            assert (inside / "file").read_text() == "old"
            for call in (lambda: client.datto_to_incremental(minor), lambda: client.datto_destroy(minor)):
                with pytest.raises(StasisError) as caught:
                    call()
                assert caught.value.errno == errno.EBUSY
        await_true(lambda: _refusal(client, minor, short_dir / "cow1") == errno.EINVAL)  # its node is no reader
        client.datto_reconfigure(minor, 1 << 20)
        assert client.datto_info(minor).node is not None
        client.datto_to_incremental(minor)
        assert client.datto_info(minor).node is None
        assert not os.path.lexists(link) or os.readlink(link) != image
        client.datto_to_snapshot(minor, short_dir / "cow1")
        image = client.datto_info(minor).node
        assert image is not None
        with mounted(image, short_dir / "image", "-o", "ro,noload") as inside:
            assert (inside / "file").read_text() == "new"
        client.stop()
        await_true(lambda: stasis.daemon_pid() is None)
        with api.connect(stasis.run_dir, stasis.state_dir) as again:
            await_true(lambda: again.datto_info(minor).node is not None)
            again.datto_destroy(minor)
