# SPDX-License-Identifier: Apache-2.0
"""Tracking over a reboot: a map is gone on with exactly if nothing can have been written in between.

A reboot is played: the kernel's part is removed, and the record is given another boot id.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stasis.linux import fsmarks
from stasis.live import lasting, pins, tracking
from stasis.live.devicefile import DeviceFile
from stasis.live.tracker import Mark, Tracker
from tests.live.disks import MAKE, mounted, tool
from tests.live.writers import MIB, bpf_works, loop_device

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices"),
              pytest.mark.tool("mkfs.ext4")]

ANOTHER_BOOT = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


@pytest.fixture
def node(image: Path) -> Iterator[str]:
    with loop_device(image, 24 * MIB) as node:
        tool("mkfs.ext4", "-q", "-F", node)
        yield node


@pytest.fixture
def mark(node: str, state: Path, tmp_path: Path) -> Mark:
    """The mark of a backup, after which a file was written to the mounted file system."""
    with tracking.start(node, state) as tracker:
        mark = tracker.switch().settle()
    with mounted(node, tmp_path / "mnt") as directory:
        (directory / "file").write_bytes(os.urandom(MIB))
    return mark


def reboot(state: Path, monkeypatch: pytest.MonkeyPatch, written: int = 0) -> None:
    """Lose what is in the kernel; the loop device's write counter cannot be set back, so what it says is told."""
    pins.remove(pins.directory_of(state))
    for path in state.glob("live/*/device.json"):
        path.write_text(re.sub(r'"boot": "[^"]*"', f'"boot": "{ANOTHER_BOOT}"', path.read_text()))
    monkeypatch.setattr("stasis.live.identity.read_counters", lambda _: written)


def name_of(node: str) -> str:
    return os.path.basename(node)


def test_a_saved_map_is_gone_on_with(node: str, state: Path, mark: Mark, monkeypatch: pytest.MonkeyPatch,
                                     tmp_path: Path) -> None:
    with Tracker.open(node, state) as tracker:
        before = tracker.changed_since(mark)
    assert lasting.save(state) == [(name_of(node), lasting.SAVED)]
    reboot(state, monkeypatch)
    assert lasting.resume_early(state) == [(name_of(node), "tracked")]
    with mounted(node, tmp_path / "mnt") as directory:  # between the two steps: tracked, but in no map yet
        (directory / "second").write_bytes(os.urandom(2 * MIB))
    assert lasting.resume(state) == [(name_of(node), lasting.TAKEN_UP)]
    with Tracker.open(node, state) as tracker:
        after = tracker.changed_since(mark)
        assert sum(length for _, length in after) >= sum(length for _, length in before) + 2 * MIB
        tracker.check()
    assert lasting.resume(state) == [(name_of(node), "tracked already")]


def test_the_root_may_be_read_only_at_the_early_step(node: str, state: Path, mark: Mark,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    lasting.save(state)
    reboot(state, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in state.rglob("*")}
    lasting.resume_early(state)
    assert {path: path.stat().st_mtime_ns for path in state.rglob("*")} == before


def _mount_behind_its_back(node: str, directory: Path) -> None:
    with mounted(node, directory):
        pass


@pytest.mark.parametrize(("what", "why"), [
    ("mounted elsewhere", "mounted, checked or replaced"),
    ("counted", "written to before"),
    ("unsaved", "not saved"),
    ("mounted at boot", "mounted before"),
    ("new file system", "mounted, checked or replaced"),
    ("saved and used again", "not saved"),
])
def test_anything_else_is_a_new_generation(node: str, state: Path, mark: Mark, monkeypatch: pytest.MonkeyPatch,
                                           tmp_path: Path, what: str, why: str) -> None:
    if what != "unsaved":
        lasting.save(state)
    if what == "saved and used again":
        with Tracker.open(node, state) as tracker:
            tracker.turn()
    reboot(state, monkeypatch, written=8 if what == "counted" else 0)
    if what == "mounted elsewhere":
        _mount_behind_its_back(node, tmp_path / "mnt")
    if what == "new file system":
        tool("mkfs.ext4", "-q", "-F", node)
    if what == "mounted at boot":
        with mounted(node, tmp_path / "mnt"):
            [(_, said)] = lasting.resume(state)
    else:
        lasting.resume_early(state)
        [(_, said)] = lasting.resume(state)
    assert said.startswith("new generation: ")
    assert why in said
    with Tracker.open(node, state) as tracker:
        tracker.check()
        assert tracker.mark.generation != mark.generation


def test_a_mounted_device_is_not_saved(node: str, state: Path, mark: Mark, tmp_path: Path) -> None:
    with mounted(node, tmp_path / "mnt"):
        [(_, said)] = lasting.save(state)
    assert said.startswith("not saved: it is mounted, and ")
    assert "does not lie on the tracked device" in said


def test_a_device_that_is_written_while_it_is_saved_is_not(node: str, state: Path, mark: Mark,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str, read: Callable[[str], str] = fsmarks.read) -> str:
        fd = os.open(node, os.O_WRONLY | os.O_DSYNC)
        os.pwrite(fd, bytes(4096), 20 * MIB)
        os.close(fd)
        return read(path)

    monkeypatch.setattr(fsmarks, "read", read)
    assert lasting.save(state) == [(name_of(node), "not saved: it is written to")]
    monkeypatch.undo()
    reboot(state, monkeypatch)
    lasting.resume_early(state)
    assert "not saved" in lasting.resume(state)[0][1]


def test_a_device_that_is_gone_after_the_boot_is_named(node: str, state: Path, mark: Mark, image: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "APPEAR_SECONDS", 0.0)
    lasting.save(state)
    reboot(state, monkeypatch)
    tool("losetup", "--detach", node)
    [(_, said)] = lasting.resume_early(state)
    assert said.startswith("not tracked: ")


def test_another_disk_under_the_old_kernel_name_is_not_taken_for_it(
    node: str, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk that was named by its serial number is not plugged in, and another one got its place in /dev."""
    monkeypatch.setattr(lasting, "APPEAR_SECONDS", 0.0)
    link = tmp_path / "by-id"
    link.symlink_to(node)
    tracking.start(str(link), state).close()
    lasting.save(state)
    reboot(state, monkeypatch)
    link.unlink()
    for _, said in (*lasting.resume_early(state), *lasting.resume(state)):
        assert said == f"not tracked: there is no device {link}"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_file_system_tells_whether_it_was_written(kind: str, tmp_path: Path) -> None:
    if subprocess.run(["which", MAKE[kind][0]], capture_output=True, check=False).returncode:
        pytest.skip(f"needs {MAKE[kind][0]}")
    size = {"ext4": 24, "xfs": 320, "btrfs": 120}[kind] * MIB
    with loop_device(tmp_path / "fs", size) as node:
        tool(*MAKE[kind], node)
        first = fsmarks.read(node)
        assert first.startswith(kind[:3])
        assert fsmarks.read(node) == first
        with mounted(node, tmp_path / "mnt"):
            (tmp_path / "mnt" / "file").touch()  # btrfs writes nothing at all when nothing changed
        second = fsmarks.read(node)
        assert second not in ("", first)


def test_what_has_no_file_system_tells_nothing(tmp_path: Path) -> None:
    with loop_device(tmp_path / "raw", MIB) as node:
        assert fsmarks.read(node) == ""


def test_a_record_is_found_by_any_name_of_its_device(node: str, state: Path, mark: Mark, tmp_path: Path) -> None:
    link = tmp_path / "by-id"
    link.symlink_to(node)
    assert DeviceFile(state, name_of(node)).read().identity.path == node
    with Tracker.open(str(link), state) as tracker:
        assert tracker.identity.path == node
