# SPDX-License-Identifier: Apache-2.0
"""COW files on the device itself: what others do to them, and deaths while they are made."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections.abc import Callable
from errno import EBUSY
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stasis.datto.cowreader import CowReader
from stasis.datto.helper import Session
from stasis.datto.ondevice import Places
from stasis.datto.placing import temporary_name
from stasis.errors import StasisError
from stasis.linux import immutable, reflink
from tests.datto.disk import Disk, mounted_disk
from tests.system.helpers import LONG, MIB, tool

pytestmark = [pytest.mark.root, pytest.mark.tool("losetup", "mkfs.ext4", "mkfs.xfs")]


def test_who_has_the_file_open_for_writing_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    with (tmp_path / "file").open("r+b") as mine:
        assert not immutable.has_other_writers(mine.fileno())
        with (tmp_path / "file").open("r+b") as other:
            assert immutable.has_other_writers(mine.fileno())
            mapping = mmap.mmap(other.fileno(), 8192)
        assert immutable.has_other_writers(mine.fileno())  # closed, but mapped
        mapping.close()
        assert not immutable.has_other_writers(mine.fileno())


def _before(monkeypatch: pytest.MonkeyPatch, word: str, action: Callable[[Session], None]) -> None:
    """Do something once, before the helper is asked for a step."""
    real, left = Session.ask, [action]

    def ask(self: Session, **fields: Any) -> dict[str, Any]:
        if word in fields and left:
            left.pop()(self)
        return real(self, **fields)

    monkeypatch.setattr(Session, "ask", ask)


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_file_that_somebody_can_write_to_is_not_used(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Who opened it before it was protected could write old pages over what lies there."""
    with contextlib.ExitStack() as held:
        def open_it(session: Session) -> None:
            fd = os.open(temporary_name(str(disk.mount / ".cow"), session.process.pid), os.O_RDWR)
            held.callback(mmap.mmap(fd, 4096).close if how == "mapped" else partial(os.close, fd))
            if how == "mapped":
                os.close(fd)

        _before(monkeypatch, "token", open_it)
        assert "open for writing" in disk.refuses(EBUSY)
    monkeypatch.undo()
    disk.make().close()


@pytest.mark.parametrize("step", ["settle", "keep"])
def test_blocks_that_somebody_else_wrote_meanwhile_are_not_used(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def write(_session: Session) -> None:
        claim = disk.claims[-1]
        assert claim is not None
        start, _ = claim.territory.ranges[0]
        claim.see([(start, 512, 0)])

    _before(monkeypatch, step, write)
    assert "taken away" in disk.refuses(EBUSY)
    assert disk.claims[-1] is None


def test_no_page_of_a_file_stays_in_memory(disk: Disk) -> None:
    (disk.mount / "file").write_bytes(os.urandom(MIB))
    with (disk.mount / "file").open("rb") as file:
        file.read()
        assert immutable.resident_pages(file.fileno()) == MIB // mmap.PAGESIZE
        immutable.drop_cache(file.fileno())
        assert immutable.resident_pages(file.fileno()) == 0


@pytest.mark.parametrize("kind", ["ext4", "xfs"] if LONG else ["xfs"])
def test_while_it_is_in_use_nobody_moves_or_changes_it(short_dir: Path, kind: str) -> None:
    with mounted_disk(short_dir, kind) as disk:
        cow, path = disk.make(), disk.mount / ".cow"
        (disk.mount / "bait").write_bytes(b"b" * MIB)
        attempts = [
            ["rm", "-f", path], ["truncate", "-s", "0", path], ["mv", disk.mount / "bait", path],
            ["mv", path, disk.mount / "away"], ["fallocate", "-p", "-o", "0", "-l", "4096", path],
            ["fallocate", "-c", "-o", "0", "-l", "4096", path], ["fallocate", "-z", "-l", "4096", path],
            ["fallocate", "-o", "0", "-l", "9M", path], ["ln", path, disk.mount / "link"],
            ["dd", "if=/dev/zero", f"of={path}", "bs=4096", "count=1", "conv=notrunc"],
        ]
        for attempt in attempts:
            assert subprocess.run([str(word) for word in attempt], capture_output=True).returncode, attempt
        move = ["e4defrag", "-v"] if kind == "ext4" else ["xfs_fsr", "-v"]
        subprocess.run([*move, str(path)], capture_output=True, timeout=60)
        disk.places.verify(cow.pinned, disk.node)
        if kind == "xfs":
            _share(path, disk.mount / "clone")
            disk.places.verify(cow.pinned, disk.node)
        cow.keep([(1, 2)], memoryview(b"k" * 4096))
        cow.finish()
        cow.release()
        cow.close()
        with CowReader(str(path), disk.image.stat().st_size) as reader:
            assert reader.kept(1) == b"k" * 4096


def _share(path: Path, clone: Path) -> None:
    source, target = os.open(path, os.O_RDONLY), os.open(clone, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        reflink.clone(source, target)
        with pytest.raises(OSError, match="FICLONE"):
            reflink.clone(target, source)
    finally:
        os.close(source)
        os.close(target)


def test_who_takes_the_protection_off_and_moves_it_is_found_out(disk: Disk) -> None:
    cow, path = disk.make(), disk.mount / ".cow"
    tool("chattr", "-i", path)
    with pytest.raises(OSError, match="protection"):
        disk.places.verify(cow.pinned, disk.node)
    contents = path.read_bytes()
    path.rename(disk.mount / "away")
    path.write_bytes(contents)
    with pytest.raises(OSError, match="another file"):
        disk.places.verify(cow.pinned, disk.node)
    cow.close()


# -- deaths ----------------------------------------------------------------------------------------------------


class _Died(BaseException):
    """The worker did."""


STEPS = ("filled", "compared", "settled", "kept")
DEATHS = [(who, step) for who in ("worker", "helper", "both") for step in STEPS]


@pytest.mark.parametrize(("who", "step"), DEATHS if LONG else DEATHS[1::5])
def test_whoever_dies_while_it_is_made_leaves_nothing_in_the_way(
    disk: Disk, who: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = Session.ask, 0
    last = 2 + STEPS.index(step)

    def ask(self: Session, **fields: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked == last:
            if who != "worker":
                self.process.kill()
                self.process.wait()
            if who != "helper":
                raise _Died
        return real(self, **fields)

    monkeypatch.setattr(Session, "ask", ask)
    if who != "helper":
        monkeypatch.setattr(Places, "_clear_away", lambda _places, session, _pinned: session.end())
    with pytest.raises((_Died, StasisError)):
        disk.make()
    monkeypatch.undo()
    if who != "both":
        assert not [path for path in disk.mount.iterdir() if "cow" in path.name]
    cow = disk.make()
    assert [path.name for path in disk.mount.iterdir() if "cow" in path.name] == [".cow"]
    cow.unlink()
    cow.close()
