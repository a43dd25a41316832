# SPDX-License-Identifier: Apache-2.0
"""Those who write to the disk are slowed, and what was in force before comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.linux import iomax
from stasis.live.throttle import LOWEST, Throttle

DISK = os.makedev(8, 0)
MIB = 1 << 20


class Cgroup:
    """A directory that looks like a cgroup's."""

    def __init__(self, path: Path, limits: str = "") -> None:
        self.path, self._bytes = path, 0
        path.mkdir(parents=True)
        (path / "io.max").write_text(limits)
        self.wrote(0)

    def wrote(self, count: int) -> None:
        self._bytes += count
        (self.path / "io.stat").write_text(f"7:1 rbytes=1 wbytes=99\n8:0 rbytes=5 wbytes={self._bytes} dios=0\n")

    @property
    def limit(self) -> str:
        """The kernel shows a line per disk; a file keeps what was written last."""
        return (self.path / "io.max").read_text()


class Keeper:
    def __init__(self) -> None:
        self.left: list[tuple[str, str]] = []

    def restore_later(self, descriptor: int, text: str) -> None:
        self.left.append((os.readlink(f"/proc/self/fd/{descriptor}"), text))


@pytest.fixture
def busy(tmp_path: Path) -> Cgroup:
    return Cgroup(tmp_path / "system.slice" / "busy.service", "8:0 rbps=max wbps=9000000 riops=max wiops=500\n")


def throttle(tmp_path: Path, keeper: Keeper, *writers: Cgroup) -> Throttle:
    """Each of the writers writes 2 MiB while it is looked at."""
    return Throttle(keeper, [DISK], tmp_path, pause=lambda _: [one.wrote(2 * MIB) for one in writers] and None)


def test_who_writes_is_slowed_to_half(tmp_path: Path, busy: Cgroup) -> None:
    idle, keeper = Cgroup(tmp_path / "idle.service"), Keeper()
    assert throttle(tmp_path, keeper, busy).tighten(float("inf"))
    assert busy.limit.split()[:3] == ["8:0", "rbps=max", f"wbps={4 * MIB}"]
    assert idle.limit == ""
    assert keeper.left == [(str(busy.path / "io.max"), "8:0 rbps=max wbps=9000000 riops=max wiops=500")]


def test_it_gets_tighter_until_nothing_is_left(tmp_path: Path, busy: Cgroup) -> None:
    keeper = Keeper()
    limits = throttle(tmp_path, keeper, busy)
    while limits.tighten(float("inf")):
        pass
    assert limits.limits == {(busy.path, DISK): LOWEST}
    assert len(keeper.left) == 1  # what was there before, and not what we set


def test_limits_are_set_again_after_a_release(tmp_path: Path, busy: Cgroup) -> None:
    """The keeper wrote what was there before; it is to write that once more at the end."""
    keeper = Keeper()
    limits = throttle(tmp_path, keeper, busy)
    assert limits.tighten(float("inf"))
    slowed, (path, before) = busy.limit, keeper.left[0]
    Path(path).write_text(before)
    limits.again()
    assert busy.limit.split()[:3] == slowed.split()[:3]  # a file keeps the end of what was longer
    assert keeper.left == [(path, before)] * 2


def test_who_is_slowed_already_need_not_be_seen(tmp_path: Path, busy: Cgroup) -> None:
    """A write that takes longer than the look at it does not show."""
    keeper, writers = Keeper(), [busy]
    limits = Throttle(keeper, [DISK], tmp_path, pause=lambda _: [one.wrote(2 * MIB) for one in writers] and None)
    assert limits.tighten(float("inf"))
    writers.clear()
    assert limits.tighten(float("inf"))
    assert limits.limits == {(busy.path, DISK): 2 * MIB}


def test_without_a_writer_that_is_seen_nothing_is_done(tmp_path: Path) -> None:
    Cgroup(tmp_path / "idle.service")
    assert not throttle(tmp_path, Keeper()).tighten(1e9)


def test_a_limit_that_is_not_there_yet_is_none(tmp_path: Path) -> None:
    group = Cgroup(tmp_path / "new.service")
    assert iomax.limit_line(group.path, DISK) == "8:0 rbps=max wbps=max riops=max wiops=max"
    assert iomax.limit_line(group.path, DISK, 5) == "8:0 rbps=max wbps=5 riops=max wiops=max"
    assert iomax.written(tmp_path / "gone", DISK) == 0
