# SPDX-License-Identifier: Apache-2.0
"""A take is of all devices or of none, whatever a worker does in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from stasis.daemon.take import Participant, take
from stasis.errors import StasisError
from tests.daemon.fake_worker import FakeWorker

Journal = list[tuple[str, str]]
Workers = Callable[..., list[FakeWorker]]


@pytest.fixture
def journal() -> Journal:
    return []


@pytest.fixture
def make_workers(journal: Journal) -> Iterator[Workers]:
    made: list[FakeWorker] = []

    def make(**faults: dict[str, str]) -> list[FakeWorker]:
        made.extend(FakeWorker(name, journal, **faults.get(name, {})) for name in ("a", "b", "c"))
        return made

    yield make
    for worker in made:
        worker.close()


def _take(workers: list[FakeWorker]) -> None:
    with open(os.devnull, "rb") as storage:
        participants = [Participant(worker.name, worker.channel, {"snapshot": "S"}, storage.fileno())
                        for worker in workers]
        result = take(participants, 1000)
    assert [device.name for device in result.devices] == ["a", "b", "c"]
    assert all((device.generation, device.change_number, device.held_ns) == ("g", 1, 5) for device in result.devices)
    assert result.hold_ns > 0


def test_no_device_switches_before_all_hold_and_none_is_released_before_all_switched(
    make_workers: Workers, journal: Journal
) -> None:
    _take(make_workers())
    operations = [operation for _, operation in journal]
    assert operations == sorted(operations, key=["prepare", "hold", "switch", "release"].index)
    assert len(operations) == 12


@pytest.mark.parametrize("fault", ["refuse", "die", "silent"])
@pytest.mark.parametrize("operation", ["prepare", "hold", "switch"])
def test_a_failure_lets_all_others_go_as_they_were(make_workers: Workers, operation: str, fault: str) -> None:
    workers = make_workers(b={operation: fault})
    with pytest.raises(StasisError):
        _take(workers)
    for worker in (workers[0], workers[2]):
        assert worker.requests[-1] == "abort"
        assert "release" not in worker.requests
        if operation != "switch":
            assert "switch" not in worker.requests


def test_the_reason_is_told(make_workers: Workers) -> None:
    with pytest.raises(StasisError) as raised:
        _take(make_workers(c={"prepare": "refuse"}))
    assert "c" in raised.value.message
    assert "prepare is impossible" in raised.value.message
    assert raised.value.errno == 28


def test_a_worker_that_dies_at_its_release_fails_the_take(make_workers: Workers) -> None:
    workers = make_workers(a={"release": "die"})
    with pytest.raises(StasisError):
        _take(workers)
    assert workers[1].requests[-1] == "abort"
