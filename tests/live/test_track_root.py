# SPDX-License-Identifier: Apache-2.0
"""A file system that has the state directory and stays mounted to the end, as a root disk: its map over a reboot.

A reboot is played as in test_track_reboot.py; tests/vm has a real one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stasis.live import devicefile, lasting, pins, seal, sealing, tracking
from stasis.live.seal import PAGE, Seal
from stasis.live.tracker import Mark, Tracker
from tests.live.disks import mounted, tool
from tests.live.test_track_reboot import name_of
from tests.live.writers import MIB, bpf_works, loop_device, read_direct, state_directory

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices"),
              pytest.mark.tool("mkfs.ext4")]

SIZE = 24 * MIB
BLOCK = 1024
BITS = bytes(range(256)) * 40
SEAL = Seal("generation", 7, "ext:1234", "another boot", seal.digest(BITS))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "image", SIZE) as node:
        tool("mkfs.ext4", "-q", "-F", node)
        yield node


@pytest.fixture
def root(node: str, tmp_path: Path) -> Iterator[Path]:
    with mounted(node, tmp_path / "root") as directory:
        yield directory


@pytest.fixture
def state(root: Path) -> Iterator[Path]:
    with state_directory(root / "state") as path:
        yield path


@pytest.fixture
def mark(node: str, state: Path) -> Mark:
    with tracking.start(node, state) as tracker:
        return tracker.switch().settle()


def forget_cached(path: Path) -> None:
    """What was written past the file system is seen; after a boot it is anyway."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remount(root: Path, how: str) -> None:
    tool("mount", "-o", f"remount,{how}", root)


def at_rest(node: str, root: Path) -> bytes:
    remount(root, "ro")
    return read_direct(node, 0, SIZE)


def check_covered(node: str, state: Path, mark: Mark, before: bytes) -> None:
    """Everything that differs from what the disk once was is in the answer."""
    with Tracker.open(node, state) as tracker:
        tracker.check()
        changed, unit = tracker.changed_since(mark), tracker.block_size
        now = read_direct(node, 0, SIZE)
    different = {at for at in range(0, SIZE, unit) if now[at : at + unit] != before[at : at + unit]}
    assert different <= {at for offset, length in changed for at in range(offset, offset + length, unit)}
    assert sum(length for _, length in changed) < SIZE


def test_its_map_is_gone_on_with(node: str, root: Path, state: Path, mark: Mark, monkeypatch: pytest.MonkeyPatch
                                 ) -> None:
    before = at_rest(node, root)
    remount(root, "rw")
    (root / "file").write_bytes(os.urandom(2 * MIB))
    assert lasting.save(state) == [(name_of(node), sealing.PREPARED)]
    assert sealing.finish(state) == [(name_of(node), "not saved: it is mounted for writing")]
    (root / "late").write_bytes(os.urandom(MIB))  # what goes on to write while the machine shuts down
    remount(root, "ro")
    assert sealing.finish(state) == [(name_of(node), "saved")]
    after = read_direct(node, 0, SIZE)
    boot_again(state, monkeypatch)
    assert lasting.resume_early(state) == [(name_of(node), "tracked")]
    remount(root, "rw")
    (root / "again").write_bytes(os.urandom(MIB))
    assert lasting.resume(state) == [(name_of(node), lasting.TAKEN_UP)]
    assert not devicefile.DeviceFile(state, name_of(node)).seal.exists()
    os.sync()
    check_covered(node, state, mark, before)
    assert after != before


def boot_again(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is given another boot id without the file system being written as a machine sees it then."""
    pins.remove(pins.directory_of(state))
    for path in state.glob("live/*/seal"):
        forget_cached(path)
    monkeypatch.setattr("stasis.live.identity.read_counters", lambda _: 0)
    monkeypatch.setattr("stasis.linux.process.boot_id", lambda: "11111111-2222-3333-4444-555555555555")


def unsealed(root: Path, state: Path) -> None:
    remount(root, "ro")


def written_after_preparing(root: Path, state: Path) -> None:
    remount(root, "ro")
    sealing.finish(state)
    remount(root, "rw")
    remount(root, "ro")


@pytest.mark.parametrize(("last", "why"), [
    (unsealed, "not saved"),
    (written_after_preparing, "mounted, checked or replaced"),
])
def test_anything_else_is_a_new_generation(last: Callable[[Path, Path], None], why: str, node: str, root: Path,
                                           state: Path, mark: Mark, monkeypatch: pytest.MonkeyPatch) -> None:
    lasting.save(state)
    last(root, state)
    boot_again(state, monkeypatch)
    lasting.resume_early(state)
    remount(root, "rw")
    [(_, said)] = lasting.resume(state)
    assert said.startswith("new generation: ")
    assert why in said


# -- the file -----------------------------------------------------------------------------------------


def test_what_is_filled_in_is_read_after_the_boot(node: str, root: Path) -> None:
    path, device = root / "seal", os.stat(root).st_dev
    seal.prepare(path, len(BITS))
    assert seal.read(path) is None
    remount(root, "ro")
    before = read_direct(node, 0, SIZE)
    seal.fill(path, node, device, SEAL, BITS)
    after = read_direct(node, 0, SIZE)
    own = {at for offset, length in seal.extents(path, device) for at in range(offset, offset + length, BLOCK)}
    assert {at for at in range(0, SIZE, BLOCK) if before[at : at + BLOCK] != after[at : at + BLOCK]} <= own
    forget_cached(path)
    assert seal.read(path) == (SEAL, BITS)
    for spoil in (lambda: tear(path, node, device), lambda: seal.spoil(path, node, device)):
        spoil()
        forget_cached(path)
        assert seal.read(path) is None


def tear(path: Path, node: str, device: int) -> None:
    """A page that was not written as a whole."""
    _, second, *_ = [at for offset, length in seal.extents(path, device) for at in range(offset, offset + length, PAGE)]
    with open(node, "r+b", buffering=0) as disk:
        disk.seek(second + seal.HEAD.size + 5)
        disk.write(b"torn")
        os.fsync(disk.fileno())


def test_a_page_that_is_not_found_on_the_device_stops_it_before_it_writes(node: str, root: Path, tmp_path: Path
                                                                          ) -> None:
    """As if FIEMAP told a wrong place: the file of another device."""
    with loop_device(tmp_path / "other", SIZE) as other:
        tool("mkfs.ext4", "-q", "-F", other)
        before = read_direct(other, 0, SIZE)
        seal.prepare(root / "seal", len(BITS))
        with pytest.raises(seal.Unsealable, match="does not have page 0"):
            seal.fill(root / "seal", other, os.stat(root).st_dev, SEAL, BITS)
        assert read_direct(other, 0, SIZE) == before


def test_a_seal_of_this_boot_is_none_of_the_last(node: str, root: Path) -> None:
    path, device = root / "seal", os.stat(root).st_dev
    seal.prepare(path, len(BITS))
    own = Seal("generation", 7, "ext:1234", Path("/proc/sys/kernel/random/boot_id").read_text().strip(), SEAL.digest)
    seal.fill(path, node, device, own, BITS)
    forget_cached(path)
    assert seal.read(path) is None
