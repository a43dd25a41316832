# SPDX-License-Identifier: Apache-2.0
"""A tracer that rests while its device is served: clean on the disk, and active before the first write reaches it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from stasis.datto.cowreader import CowReader
from stasis.datto.layout import Header
from stasis.datto.resting import Resting
from tests.datto.rig import BLOCK, SIZE, Refused, Rig, killed_at


@pytest.fixture
def rig(short_dir: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Rig:
    return Rig(short_dir, monkeypatch, seed)


def _is_clean(rig: Rig) -> bool:
    """As it would be found after a power cut."""
    return Header.unpack(rig.durable[rig.cow().stat().st_ino][:64], "cow").is_clean


@pytest.mark.parametrize("write", [
    lambda rig: rig.write(BLOCK, 1), lambda rig: rig.discard(0, BLOCK), lambda rig: rig.zero(0, 70000),
], ids=["write", "discard", "zero"])
def test_the_clean_flag_is_gone_from_the_disk_before_anything_is_written(rig: Rig, monkeypatch: pytest.MonkeyPatch,
                                                                        write: Callable[[Rig], None]) -> None:
    rig.rest()
    assert (_is_clean(rig), rig.host.events) == (True, [])
    seen: list[bool] = []

    def looked(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            seen.append(_is_clean(rig))
            return real(*arguments, **named)

        return call

    for name in ("write", "discard", "zero"):
        monkeypatch.setattr(rig.host.origin, name, looked(getattr(rig.host.origin, name)))
    write(rig)
    assert seen
    assert not any(seen)
    assert rig.host.events == ["datto_woke"]
    assert rig.read_image() == rig.image
    rig.close()


def test_reads_and_looks_do_not_end_it(rig: Rig) -> None:
    rig.write(0, 5000)
    rig.rest()
    assert rig.read_image() == rig.image
    assert rig.ask("info")["rests"]
    rig.hosted.tick()
    rig.hosted.clear_intents()
    assert _is_clean(rig)
    assert not rig.ask("wake")["rests"]
    assert not _is_clean(rig)
    rig.close()


def test_a_snapshot_that_rested_outlives_a_power_cut(rig: Rig) -> None:
    rig.write(0, 50000)
    rig.rest()
    rig.cut()
    assert rig.read_image() == rig.image
    rig.write(100000, 5000)
    assert rig.read_image() == rig.image
    rig.close()


def test_a_write_while_the_file_is_made_durable_ends_the_rest(rig: Rig) -> None:
    jobs: list[tuple[Callable[[], None], Callable[[OSError | None], None]]] = []
    rig.host.background.run = lambda job, done: jobs.append((job, done))  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        rig.rest()  # there is no answer yet
    rig.write(0, 1)
    job, done = jobs.pop()
    job()
    done(None)
    assert not jobs
    assert not rig.hosted.rests
    assert not _is_clean(rig)
    rig.close()


def test_a_file_that_cannot_be_written_ends_the_tracer_and_not_the_write(rig: Rig, monkeypatch: pytest.MonkeyPatch,
                                                                        ) -> None:
    assert rig.hosted.tracer is not None
    rig.rest()

    def fail() -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(rig.hosted.tracer.cow, "sync", fail)
    rig.write(0, 5000)
    assert rig.path.read_bytes()[:5000] == bytes(rig.buffer.view[:5000])
    assert rig.ask("info")["error"] == -errno.EIO
    assert not list(rig.directory.glob("datto-*"))
    with pytest.raises(Refused) as caught:
        rig.ask("rest")
    assert caught.value.args == (errno.EINVAL,)
    rig.ask("drop")
    rig.close()


def test_one_that_is_retired_leaves_a_clean_file_that_is_not_taken_up_again(rig: Rig) -> None:
    rig.write(0, 1)
    rig.to_incremental()
    rig.rest()
    rig.ask("retire")
    assert rig.hosted.tracer is None
    assert not list(rig.directory.glob("datto-*"))
    rig.write(SIZE // 2, 1)
    with CowReader(str(rig.cow()), SIZE) as reader:
        assert (reader.header.is_clean, list(reader.extents())) == (True, [(0, BLOCK)])
    rig.restart()
    assert rig.ask("info")["error"] == -errno.EINVAL
    rig.close()


@pytest.mark.parametrize("after", ["die", "cut"])
def test_a_worker_may_die_at_any_file_operation_of_rest_and_waking(rig: Rig, monkeypatch: pytest.MonkeyPatch,
                                                                  after: str) -> None:
    rig.to_incremental()
    killed = calls = 0
    while killed == calls:
        rig.write(3 * BLOCK * calls, 5000)
        killed += killed_at(monkeypatch, calls, lambda: _rest_and_write(rig))
        calls += 1
        rig.die() if after == "die" else rig.cut()
        assert rig.hosted.tracer is not None, rig.hosted.describe()
        assert not isinstance(rig.host.export.observer, Resting)
        rig.to_snapshot()
        assert rig.copied == rig.image
        rig.to_incremental()
    assert killed >= 6
    rig.close()


def _rest_and_write(rig: Rig) -> None:
    rig.rest()
    rig.write(SIZE // 2, 9000)
