# SPDX-License-Identifier: Apache-2.0
"""The snapshot filter's commands, with the errnos of blksnap's filter mechanism."""

from __future__ import annotations

import base64
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stasis as api
from tests.daemon.helpers import MIB, write

MakeImage = Callable[..., Path]
UNKNOWN = "6f1c2a7e-0000-4000-8000-000000000000"


@pytest.fixture
def device(client: api.Client, make_image: MakeImage) -> str:
    return client.attach(make_image()).name


def _errno(call: Callable[..., Any], *arguments: Any, **named: Any) -> int:
    with pytest.raises(api.StasisError) as raised:
        call(*arguments, **named)
    return raised.value.errno


def test_attach_and_detach(client: api.Client, make_image: MakeImage) -> None:
    assert client.filters() == ["snapshot"]
    image = make_image("other")
    assert _errno(client.attach, image, filter="unknown") == errno.ENOENT
    client.attach(image)
    assert _errno(client.attach, image) == errno.EALREADY
    client.detach("other")
    assert _errno(client.detach, "other") == errno.ENOENT


def test_commands_to_the_wrong_filter(client: api.Client, device: str) -> None:
    assert _errno(client.control, "none", "cbtinfo") == errno.ENOENT
    assert _errno(client.control, device, "cbtinfo", filter="other") == errno.EINVAL
    assert _errno(client.control, device, "unknown") == errno.ENOTTY


def test_cbtinfo_is_the_map_info(client: api.Client, device: str) -> None:
    info = client.control(device, "cbtinfo")
    assert info["generation"] == client.map_info(device).generation
    assert (info["block_size"], info["block_count"], info["change_number"]) == (65536, 64, 0)


def test_cbtmap_gives_bytes_within_the_map_only(client: api.Client, device: str) -> None:
    client.mark(device, [(65536, 1)])
    answer = client.control(device, "cbtmap", {"offset": 0, "length": 3})
    assert base64.b64decode(answer["map"]) == b"\0\1\0"
    for offset, length in ((0, 65), (64, 1), (65, 0), (-1, 1), (0, -1)):
        assert _errno(client.control, device, "cbtmap", {"offset": offset, "length": length}) == errno.ENODATA
    assert _errno(client.control, device, "cbtmap", {"offset": "x"}) == errno.EINVAL


def test_cbtdirty_checks_all_ranges_before_it_marks_one(client: api.Client, device: str) -> None:
    for wrong in ([4 * MIB, 1], [0, 0], [-1, 5], [1], "x"):
        assert _errno(client.control, device, "cbtdirty", {"ranges": [[0, 512], wrong]}) == errno.EINVAL
    assert client.changed_extents(device, 0) == []
    client.control(device, "cbtdirty", {"ranges": [[0, 512], [4 * MIB - 1, 1]]})
    assert client.changed_extents(device, 0) == [api.Extent(0, 65536), api.Extent(4 * MIB - 65536, 65536)]


def test_very_many_ranges_can_be_marked_at_once(client: api.Client, device: str) -> None:
    client.mark(device, [(number % 64 * 65536, 1) for number in range(5000)])
    assert client.changed_extents(device, 0) == [api.Extent(0, 4 * MIB)]


def test_snapshotadd(client: api.Client, device: str, make_image: MakeImage, storage: Path) -> None:
    snapshot = client.create_snapshot(storage, limit=64 * MIB)
    assert _errno(client.control, device, "snapshotadd", {"id": UNKNOWN}) == errno.ESRCH
    client.control(device, "snapshotadd", {"id": snapshot.id})
    assert _errno(client.control, device, "snapshotadd", {"id": snapshot.id}) == errno.EALREADY
    other = client.create_snapshot(storage, limit=64 * MIB)
    assert _errno(client.control, device, "snapshotadd", {"id": other.id}) == errno.EBUSY
    client.take(snapshot.id)
    late = client.attach(make_image("late")).name
    assert _errno(client.control, late, "snapshotadd", {"id": snapshot.id}) == errno.EALREADY


def test_snapshotinfo(client: api.Client, device: str, storage: Path) -> None:
    assert _errno(client.control, device, "snapshotinfo") == errno.ENOENT
    snapshot = client.create_snapshot(storage, [device], limit=64 * MIB, take=True)
    info = client.control(device, "snapshotinfo")
    assert info == {"id": snapshot.id, "error_code": 0, "image": snapshot.device(device).uri}


def test_snapshot_calls(client: api.Client, device: str, storage: Path) -> None:
    assert _errno(client.take, UNKNOWN) == errno.ESRCH
    assert _errno(client.destroy, UNKNOWN) == errno.ENODEV
    assert _errno(client.wait_events, UNKNOWN, timeout=0) == errno.ESRCH
    empty = client.create_snapshot(storage, limit=64 * MIB)
    assert _errno(client.take, empty.id) == errno.ENODEV
    client.add(empty.id, device)
    client.take(empty.id)
    assert _errno(client.take, empty.id) == errno.EALREADY
    assert _errno(client.create_snapshot, storage, [device, device], limit=64 * MIB) == errno.EBUSY


def test_a_change_of_an_image_is_marked_in_both_maps(client: api.Client, device: str, storage: Path) -> None:
    snapshot = client.create_snapshot(storage, [device], limit=64 * MIB, take=True)
    write(snapshot.device(device).uri or "", MIB, b"scratch")
    changed = [api.Extent(MIB, 65536)]
    assert client.changed_extents(device, 0, held=True) == changed
    assert client.changed_extents(device, 1) == changed
