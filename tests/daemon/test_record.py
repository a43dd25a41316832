# SPDX-License-Identifier: Apache-2.0
"""Names of devices, and what is remembered of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.daemon import record
from stasis.daemon.record import DeviceRecord
from stasis.errors import StateError, UsageError


@pytest.mark.parametrize(
    ("path", "name"),
    [("/dev/sdb", "sdb"), ("a disk.img", "a_disk.img"), ("/x/.hidden", "hidden"), ("/x/@", "device"),
     ("/", "device"), ("/x/" + "y" * 80, "y" * 63)],
)
def test_names_are_made_from_paths(path: str, name: str) -> None:
    assert record.default_name(path) == name


@given(st.text(st.characters(exclude_characters="\0"), max_size=200))
def test_every_path_gives_a_name_that_is_one(path: str) -> None:
    assert record.valid_name(record.default_name(path))


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "-a", ".a", "a b", "a\n", "x" * 64])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError):
        record.valid_name(name)


def test_a_record_comes_back(tmp_path: Path) -> None:
    wanted = DeviceRecord("disk", "/dev/sdb", kernel=True, tracking_block=1 << 20, bitmaps=[1, 2])
    record.save(tmp_path / "disk", wanted)
    assert record.load(tmp_path / "disk") == wanted


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"name": "disk"}', '{"name": "other", "path": "/x"}',
             '{"name": "disk", "path": 5}', '{"name": "disk", "path": "/x", "surprise": 1}']
)
def test_a_damaged_record_is_told_by_its_path(tmp_path: Path, text: str) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    (directory / "device.json").write_text(text)
    with pytest.raises(StateError) as raised:
        record.load(directory)
    assert str(directory / "device.json") in raised.value.message
    assert "--forget" in raised.value.hint


def test_a_record_that_is_written_is_whole_or_not_there(tmp_path: Path) -> None:
    record.save(tmp_path / "disk", DeviceRecord("disk", "/old"))
    record.save(tmp_path / "disk", DeviceRecord("disk", "/new"))
    assert os.listdir(tmp_path / "disk") == ["device.json"]
    assert json.loads((tmp_path / "disk" / "device.json").read_text())["path"] == "/new"


def test_links_to_one_file_are_one_origin(tmp_path: Path) -> None:
    image, link, hard, other = (tmp_path / name for name in ("image", "link", "hard", "other"))
    image.touch()
    other.touch()
    link.symlink_to(image)
    os.link(image, hard)
    assert record.origin_key(str(image)) == record.origin_key(str(link)) == record.origin_key(str(hard))
    assert record.origin_key(str(image)) != record.origin_key(str(other))
    assert record.origin_key(str(tmp_path / "none")) is None
