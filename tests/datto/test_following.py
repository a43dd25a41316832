# SPDX-License-Identifier: Apache-2.0
"""The transition to the next snapshot in steps: what happens between them, and when nobody asks for the next one."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stasis.datto.cowreader import CowReader
from tests.datto.rig import BLOCK, SIZE, Refused, Rig


@pytest.fixture
def rig(short_dir: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Rig:
    rig = Rig(short_dir, monkeypatch, seed)
    rig.to_incremental()
    return rig


def _prepare(rig: Rig) -> Path:
    path = rig.directory / f"cow{rig.number + 1}"
    rig.ask("prepare_next", cow=str(path), size=1 << 23)
    return path


def _settle(rig: Rig) -> None:
    """What `Rig.to_snapshot` does once the worker has answered."""
    finished = rig.cow()
    rig.number, rig.mode, rig.image = rig.number + 1, "snapshot", rig.path.read_bytes()
    copied, now = bytearray(rig.copied), rig.read_image()
    with CowReader(str(finished), SIZE) as reader:
        assert (reader.header.is_clean, reader.header.is_index_only) == (True, True)
        for offset, length in reader.extents():
            copied[offset : offset + length] = now[offset : offset + length]
    rig.copied = bytes(copied)


def test_writes_between_the_steps_are_in_the_file_that_is_theirs(rig: Rig) -> None:
    rig.write(0, 5000)
    _prepare(rig)
    rig.write(10 * BLOCK, 5000)
    rig.ask("follow")
    at_follow = rig.path.read_bytes()
    rig.write(20 * BLOCK, 5000)
    assert rig.read_image() == at_follow
    rig.ask("finish")
    with CowReader(str(rig.cow()), SIZE) as reader:
        assert [offset // BLOCK for offset, _ in reader.extents()] == [0, 10]
    rig.close()


def test_one_that_is_given_up_leaves_nothing(rig: Rig) -> None:
    path = _prepare(rig)
    assert path.exists()
    rig.ask("abort")
    assert not path.exists()
    assert len(list(rig.directory.glob("datto-*"))) == 1
    with pytest.raises(Refused) as caught:
        rig.ask("follow")
    assert caught.value.args == (errno.EINVAL,)
    with pytest.raises(Refused):
        rig.ask("finish")
    _prepare(rig)
    path = _prepare(rig)  # the daemon died and begins anew
    rig.write(0, 1)
    rig.ask("follow")
    rig.ask("finish")
    _settle(rig)
    assert rig.copied == rig.image
    rig.close()


def test_a_file_that_nobody_asked_to_finish_is_finished_before_the_next(rig: Rig) -> None:
    rig.write(0, 5000)
    _prepare(rig)
    rig.ask("follow")
    before = rig.cow()
    rig.number, rig.mode = rig.number + 1, "snapshot"
    rig.to_incremental()
    _prepare(rig)
    with CowReader(str(before), SIZE) as reader:
        assert (reader.header.is_clean, list(reader.extents())) == (True, [(0, 2 * BLOCK)])
    rig.ask("abort")
    rig.close()


def test_a_tracer_that_fails_meanwhile_does_not_follow(rig: Rig) -> None:
    assert rig.hosted.tracer is not None
    path = _prepare(rig)
    rig.hosted.tracer.fail(errno.EIO)
    with pytest.raises(Refused) as caught:
        rig.ask("follow")
    assert caught.value.args == (errno.EIO,)
    assert not path.exists()
    rig.close()


def _die_wholly(rig: Rig) -> None:
    """Close what the death of a process closes, and remove a name that holds the number of the process."""
    Rig._die(rig)
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = Path(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
            if name.parent == rig.directory and name.name.startswith(("cow", ".cow", "datto-")):
                os.close(int(fd))
    for path in rig.directory.glob(".cow*.new"):
        path.unlink()


class _Killed(BaseException):
    """The worker dies here."""


@pytest.mark.parametrize("after", ["die", "cut"])
def test_a_worker_may_die_at_any_file_operation_of_a_transition(rig: Rig, monkeypatch: pytest.MonkeyPatch,
                                                              after: str, short_dir: Path, seed: int) -> None:
    """It goes on with the right file, or says that it does not."""
    killed = calls = ended = 0
    while killed == calls:
        left = calls

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise _Killed
                return real(*arguments, **named)

            return call

        rig.write(7 * BLOCK * calls, 9000)
        with monkeypatch.context() as inner:
            for name in ("pwrite", "fdatasync", "unlink", "replace"):
                inner.setattr(os, name, counted(getattr(os, name)))
            try:
                _prepare(rig)
                rig.ask("follow")
                rig.ask("finish")
            except _Killed:
                killed += 1
        calls += 1
        if killed < calls:
            break
        monkeypatch.setattr(rig, "_die", functools.partial(_die_wholly, rig))
        rig.die() if after == "die" else rig.cut()
        if rig.hosted.tracer is None:
            assert rig.ask("info")["error"] == -errno.EINVAL
            ended += 1
            rig.close()
            (short_dir / f"again{calls}").mkdir()
            rig = Rig(short_dir / f"again{calls}", monkeypatch, seed)
            rig.to_incremental()
            continue
        assert rig.hosted.tracer.cow.path == str(rig.cow())
        rig.to_snapshot()
        assert rig.copied == rig.image
        rig.to_incremental()
    assert killed >= 6
    assert ended < killed
    _settle(rig)
    assert rig.copied == rig.image
    rig.close()
