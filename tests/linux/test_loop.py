# SPDX-License-Identifier: Apache-2.0
"""Loop devices made by our own ioctls, against what the block layer says about them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stasis.linux import blockdev, loop

SIZE = 8 << 20

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.path.exists(loop.CONTROL), reason="this kernel has no loop devices"),
]


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SIZE + 512))
    return str(path)


def test_device_has_the_wanted_sector_and_size(image: str) -> None:
    node = loop.attach(image, 4096, SIZE)
    try:
        with open(node, "rb") as device:
            assert blockdev.logical_block_size(device.fileno()) == 4096
            assert blockdev.size(device.fileno()) == SIZE
            assert not blockdev.is_read_only(device.fileno())
            assert device.read() == Path(image).read_bytes()[:SIZE]
        assert loop.is_attached(node, image)
        assert not loop.is_attached(node, image + "x")
    finally:
        loop.detach(node)
    assert not loop.is_attached(node, image)


def test_read_only_device_refuses_writes(image: str) -> None:
    node = loop.attach(image, 512, SIZE, read_only=True)
    try:
        with open(node, "rb") as device:
            assert blockdev.is_read_only(device.fileno())
        with pytest.raises(OSError) as caught, open(node, "rb+", buffering=0) as device:  # either call may refuse
            device.write(bytes(512))
        assert caught.value.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
    finally:
        loop.detach(node)


def test_device_in_use_goes_with_its_last_user(image: str) -> None:
    node = loop.attach(image, 512, SIZE)
    with open(node, "rb") as device:
        loop.detach(node)
        assert device.read(512) == Path(image).read_bytes()[:512]
    assert not loop.is_attached(node, image)


def test_detaching_a_free_device_says_so(image: str) -> None:
    node = loop.attach(image, 512, SIZE)
    loop.detach(node)
    with pytest.raises(OSError, match="LOOP_CLR_FD") as caught:
        loop.detach(node)
    assert caught.value.errno == errno.ENXIO


def test_missing_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        loop.attach(str(tmp_path / "none"), 512, SIZE)


def test_sector_that_no_device_can_have_is_refused(image: str) -> None:
    with pytest.raises(OSError, match="LOOP_CONFIGURE") as caught:
        loop.attach(image, 1000, SIZE)
    assert caught.value.errno == errno.EINVAL
