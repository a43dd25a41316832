# SPDX-License-Identifier: Apache-2.0
"""Every reader of a snapshot's events sees all of them, in order, and is woken when no more will come."""

from __future__ import annotations

import threading

import pytest

from stasis.block.events import Event, EventCode, EventQueue


def test_events_are_numbered_and_stay() -> None:
    queue = EventQueue()
    first = queue.post("low_space", "S", device="a", requested=5)
    second = queue.post("corrupted", "S", device="a", error_code=-28, monotonic_ns=7)
    assert (first.sequence, second.sequence, queue.last) == (1, 2, 2)
    assert (second.code, second.error_code, second.time) == (EventCode.CORRUPTED, -28, 7)
    for _ in range(2):
        assert queue.wait(0, 0) == [first, second]
    assert queue.wait(1, 0) == [second]
    assert queue.wait(2, 0) == []


def test_codes_are_those_of_blksnap() -> None:
    assert (EventCode.CORRUPTED, EventCode.NO_SPACE) == (0, 1)


def test_a_name_that_is_no_event_is_refused() -> None:
    with pytest.raises(KeyError):
        EventQueue().post("rain", "S")


def test_a_queue_goes_on_where_its_record_ends() -> None:
    queue = EventQueue()
    queue.post("no_space", "S", requested=1 << 20)
    again = EventQueue(Event(**event.as_dict()) for event in queue.events())
    assert again.events() == queue.events()
    assert again.post("corrupted", "S").sequence == 2


def test_waiting_readers_get_an_event_at_once() -> None:
    queue = EventQueue()
    got: list[list[Event]] = []
    readers = [threading.Thread(target=lambda: got.append(queue.wait(0, None))) for _ in range(3)]
    for reader in readers:
        reader.start()
    event = queue.post("generation", "S", device="a", reason="resized")
    for reader in readers:
        reader.join(30)
    assert got == [[event]] * 3


def test_closing_wakes_readers() -> None:
    queue = EventQueue()
    got: list[list[Event]] = []
    reader = threading.Thread(target=lambda: got.append(queue.wait(0, None)))
    reader.start()
    queue.close()
    reader.join(30)
    assert (got, queue.closed) == ([[]], True)


def test_memory_is_bounded() -> None:
    queue = EventQueue()
    for _ in range(EventQueue.LIMIT + 10):
        queue.post("generation", "S")
    assert len(queue.events()) == EventQueue.LIMIT
    assert queue.last == EventQueue.LIMIT + 10


def test_each_event_is_taken_once_and_only_by_who_asks_for_its_kind() -> None:
    queue = EventQueue()
    assert queue.take((0, 1)) is None
    queue.post("low_space", "S")
    full, lost = queue.post("no_space", "S"), queue.post("corrupted", "S")
    assert queue.take((0,)) == lost
    assert queue.take((0, 1)) == full
    assert queue.take((0, 1)) is None
    assert queue.delivered() == [full.sequence, lost.sequence]
    again = EventQueue(queue.events(), queue.delivered())
    assert again.take((0, 1)) is None
    assert again.take((2,)) is not None


def test_who_waits_to_take_is_woken_by_an_event_of_its_kind_and_by_the_end() -> None:
    queue, woken = EventQueue(), threading.Event()

    def wait() -> None:
        queue.wait_to_take((0, 1), None)
        woken.set()

    for wake in (lambda: queue.post("corrupted", "S"), queue.close):
        waiting = threading.Thread(target=wait)
        waiting.start()
        queue.post("low_space", "S")
        wake()
        waiting.join(60)
        assert woken.is_set()
        woken.clear()
        queue.take((0,))
    assert queue.take((0, 1, 2)) is None
