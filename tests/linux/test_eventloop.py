# SPDX-License-Identifier: Apache-2.0
"""The event loop: readiness, order, time, and being woken from outside."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from stasis.linux.eventloop import EPOLLIN, EPOLLOUT, EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    with EventLoop() as loop:
        yield loop


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def test_ready_descriptors_are_called(loop: EventLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    seen: list[int] = []
    loop.register(pair[0].fileno(), EPOLLIN, seen.append)
    loop.run_once(0)
    assert seen == []
    pair[1].send(b"x")
    loop.run_once(0)
    loop.run_once(0)
    assert seen == [EPOLLIN, EPOLLIN]  # level-triggered: nobody has read
    loop.modify(pair[0].fileno(), EPOLLOUT)
    loop.run_once(0)
    assert seen[2:] == [EPOLLOUT]
    loop.unregister(pair[0].fileno())
    loop.run_once(0)
    assert len(seen) == 3


def test_a_callback_may_take_another_off_in_the_same_turn(loop: EventLoop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    calls: list[int] = []

    def both_off(events: int) -> None:
        calls.append(events)
        for left, _ in pairs:
            loop.unregister(left.fileno())

    for left, right in pairs:
        loop.register(left.fileno(), EPOLLIN, both_off)
        right.send(b"x")
    loop.run_once(0)
    assert len(calls) == 1
    for left, right in pairs:
        left.close()
        right.close()


def test_registering_twice_is_an_error(loop: EventLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    loop.register(pair[0].fileno(), EPOLLIN, lambda events: None)
    with pytest.raises(FileExistsError):
        loop.register(pair[0].fileno(), EPOLLIN, lambda events: None)


def test_soon_means_the_next_turn_and_not_this_one(loop: EventLoop) -> None:
    calls: list[int] = []

    def again() -> None:
        calls.append(len(calls))
        loop.call_soon(again)

    loop.call_soon(again)
    loop.run_once()
    assert calls == [0]
    loop.run_once()
    assert calls == [0, 1]


def test_timers_fire_in_order_of_time(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    calls: list[str] = []
    loop.call_later(2, lambda: calls.append("two"))
    loop.call_later(1, lambda: calls.append("one"))
    loop.every(3, lambda: calls.append("three"))
    cancelled = loop.call_later(1, lambda: calls.append("never"))
    cancelled.cancel()
    for step in range(1, 8):
        now = 1000.0 + step
        loop.run_once(0)
    assert calls == ["one", "two", "three", "three"]


def test_a_repeated_timer_can_cancel_itself(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    calls: list[float] = []

    def once() -> None:
        calls.append(now)
        timer.cancel()

    timer = loop.every(1, once)
    for now in (1.5, 3.0, 4.5):  # noqa: B007 - read by the clock
        loop.run_once(0)
    assert calls == [1.5]


def test_cancelled_timers_do_not_pile_up(loop: EventLoop) -> None:
    for _ in range(10_000):
        loop.call_later(3600, lambda: None).cancel()
    assert len(loop._timers) < 1000


def test_stop_from_a_signal_handler_ends_the_wait(loop: EventLoop) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: loop.stop())
    try:
        loop.call_soon(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        loop.run()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_stop_from_another_thread_even_before_run(loop: EventLoop) -> None:
    thread = threading.Thread(target=loop.stop)
    thread.start()
    thread.join()
    loop.run()
    loop.call_soon(loop.stop)
    loop.run()  # and it can be run again


def test_an_exception_leaves_the_loop_usable(loop: EventLoop) -> None:
    def fail() -> None:
        raise ValueError("a callback's own")

    loop.call_soon(fail)
    with pytest.raises(ValueError, match="callback's own"):
        loop.run()
    loop.call_soon(loop.stop)
    loop.run()
