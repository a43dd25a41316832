# SPDX-License-Identifier: Apache-2.0
"""Counters, timers, signals and what watches descriptors come back as they were."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from pathlib import Path

import pytest

from stasis.linux import epoll as epoll_call
from stasis.linux import inotify, timerfd
from tests.process.cycles import cycle, findings_of, make_child

pytestmark = pytest.mark.root

IN_CREATE = 0x100


def test_an_eventfd_keeps_its_counter_and_how_it_is_read(tmp_path: Path) -> None:
    probe = os.eventfd(0)
    tells_semaphores = "eventfd-semaphore" in Path(f"/proc/self/fdinfo/{probe}").read_text()  # since Linux 6.5
    os.close(probe)

    def set_up() -> list[int]:
        large = os.eventfd(0)
        os.eventfd_write(large, (1 << 64) - 2)
        return [os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK), large, os.eventfd(0, os.EFD_NONBLOCK)]

    def verify(fds: list[int]) -> None:
        semaphore, large, empty = fds
        one_by_one = [os.eventfd_read(semaphore) for _ in range(3 if tells_semaphores else 1)]
        assert one_by_one == ([1, 1, 1] if tells_semaphores else [3])
        assert not os.get_blocking(semaphore)
        assert os.eventfd_read(large) == (1 << 64) - 2
        assert os.get_blocking(large)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(empty)

    cycle(tmp_path / "images", set_up, verify)


def _remaining(fd: int) -> tuple[int, int]:
    """Seconds until a timer expires, and its interval."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines())
    value, interval = (fields[name].strip(" \t()").split(",")[0] for name in ("it_value", "it_interval"))
    return int(value), int(interval)


def test_timers_go_on_with_what_was_left(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        relative, absolute, expired, idle = (timerfd.timerfd(clock) for clock in (1, 0, 1, 7))
        timerfd.timerfd_settime(relative, 0, (500, 0), (1000, 0))
        timerfd.timerfd_settime(absolute, timerfd.TFD_TIMER_ABSTIME, (0, 0), (int(time.time()) + 2000, 0))
        timerfd.timerfd_settime(expired, 0, (3000, 0), (0, 1))
        select.select([expired], [], [])
        return [relative, absolute, expired, idle]

    def verify(fds: list[int]) -> None:
        relative, absolute, expired, idle = fds
        left, interval = _remaining(relative)
        assert 900 < left <= 1000
        assert interval == 500
        assert 1900 < _remaining(absolute)[0] <= 2000
        assert int.from_bytes(os.read(expired, 8), "little") == 1
        assert 2900 < _remaining(expired)[0] <= 3000
        assert _remaining(idle) == (0, 0)

    cycle(tmp_path / "images", set_up, verify)


def test_a_signalfd_reads_its_signals(tmp_path: Path) -> None:
    def set_up() -> int:
        return timerfd.signalfd(1 << signal.SIGUSR1 - 1 | 1 << signal.SIGRTMAX - 1)

    def verify(fd: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMAX])
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMAX):
            os.kill(os.getpid(), number)
        assert [os.read(fd, 128)[0] for _ in range(2)] == [signal.SIGUSR1, signal.SIGRTMAX]
        assert select.select([fd], [], [], 0)[0] == []

    cycle(tmp_path / "images", set_up, verify)


def test_an_epoll_watches_what_it_watched(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        epoll, outer, ready, idle = select.epoll(), select.epoll(), os.eventfd(1), os.eventfd(0)
        epoll_call.add(epoll.fileno(), ready, select.EPOLLIN, 0x1234567890ABCDEF)
        epoll_call.add(epoll.fileno(), idle, select.EPOLLIN | select.EPOLLET, 7)
        epoll_call.add(outer.fileno(), epoll.fileno(), select.EPOLLIN, 8)
        return [os.dup2(epoll.fileno(), 30), os.dup2(outer.fileno(), 31), ready, idle]

    def verify(fds: list[int]) -> None:
        inner, outer, ready, idle = fds
        with select.epoll.fromfd(inner) as epoll, select.epoll.fromfd(outer) as both:
            assert both.poll(0) == [(8, select.EPOLLIN)]
            text = Path(f"/proc/self/fdinfo/{inner}").read_text()
            assert "data: 1234567890abcdef" in text
            os.eventfd_read(ready)
            assert epoll.poll(0) == []
            os.eventfd_write(idle, 1)
            assert epoll.poll(0) == [(7, select.EPOLLIN)]
            assert epoll.poll(0) == []
            epoll.unregister(idle)
            epoll.unregister(ready)

    cycle(tmp_path / "images", set_up, verify)


def test_an_epoll_finds_targets_that_were_duplicated_and_closed(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        epoll, first = select.epoll(), os.eventfd(0)
        epoll_call.add(epoll.fileno(), first, select.EPOLLIN, 1)
        moved = os.dup2(first, 40)
        second = os.dup2(os.eventfd(0), first)  # takes the number that the first was added under
        epoll_call.add(epoll.fileno(), second, select.EPOLLIN, 2)
        return [os.dup2(epoll.fileno(), 41), moved, second]

    def verify(fds: list[int]) -> None:
        watching, moved, second = fds
        with select.epoll.fromfd(watching) as epoll:
            os.eventfd_write(moved, 1)
            assert epoll.poll(0) == [(1, select.EPOLLIN)]
            os.eventfd_write(second, 1)
            assert sorted(epoll.poll(0)) == [(1, select.EPOLLIN), (2, select.EPOLLIN)]

    cycle(tmp_path / "images", set_up, verify)


def test_descriptors_are_shared_between_processes_as_they_were(tmp_path: Path) -> None:
    def set_up() -> int:
        fd = os.eventfd(0)
        os.set_blocking(fd, False)
        make_child(lambda: os.dup2(fd, 50))
        return fd

    def verify(fd: int) -> None:
        assert os.eventfd_read(fd) == 5

    def verify_child(fd: int) -> None:
        os.eventfd_write(50, 2)
        os.eventfd_write(fd, 3)

    cycle(tmp_path / "images", set_up, verify, verify_child)


def test_an_epoll_whose_target_is_open_elsewhere_is_named(tmp_path: Path) -> None:
    def set_up() -> None:
        epoll, target = select.epoll(), os.eventfd(0)
        epoll.register(target)
        os.dup2(epoll.fileno(), 60)
        make_child(lambda: os.closerange(60, 61) or epoll.close())
        os.close(target)

    (finding,) = findings_of(set_up, tmp_path / "images")
    assert "it watches what was descriptor" in finding.reason


def test_owner_and_signal_are_kept(tmp_path: Path) -> None:
    def set_up() -> int:
        reader, writer = os.pipe()
        fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGUSR1)
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
        os.dup2(writer, 70)
        return reader

    def verify(reader: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.write(70, b"x")
        assert signal.sigtimedwait([signal.SIGUSR1], 10) is not None
        assert fcntl.fcntl(reader, fcntl.F_GETOWN) == os.getpid()

    cycle(tmp_path / "images", set_up, verify)


def test_watches_keep_their_numbers_and_see_what_happens(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()

    def set_up() -> tuple[int, list[int]]:
        fd = inotify.inotify(os.O_NONBLOCK)
        watches = [inotify.add_watch(fd, str(tmp_path / name), IN_CREATE) for name in ("first", "second")]
        inotify.remove_watch(fd, watches.pop(0))
        os.read(fd, 4096)
        return fd, [*watches, inotify.add_watch(fd, str(tmp_path / "first"), IN_CREATE)]

    def verify(state: tuple[int, list[int]]) -> None:
        fd, (second, first) = state
        assert not os.get_blocking(fd)
        (tmp_path / "first" / "a").touch()
        (tmp_path / "second" / "b").touch()
        events = os.read(fd, 4096)
        assert [int.from_bytes(events[at : at + 4], "little") for at in (0, 32)] == [first, second]
        assert (events[16:17], events[48:49]) == (b"a", b"b")

    cycle(tmp_path / "images", set_up, verify)


def test_a_pidfd_leads_to_its_process(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        dead = os.fork()
        if dead == 0:
            os._exit(0)
        fds = [os.pidfd_open(os.getpid()), os.pidfd_open(dead)]
        os.waitpid(dead, 0)
        return fds

    def verify(fds: list[int]) -> None:
        alive, dead = fds
        assert f"NSpid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{alive}").read_text()
        assert "NSpid:\t-1\n" in Path(f"/proc/self/fdinfo/{dead}").read_text()
        assert select.select([alive, dead], [], [], 0)[0] == [dead]

    cycle(tmp_path / "images", set_up, verify)


def test_a_pidfd_of_a_process_outside_is_named(tmp_path: Path) -> None:
    ours = os.getpid()
    (finding,) = findings_of(lambda: os.pidfd_open(ours), tmp_path / "images")
    assert f"process {ours}, outside the tree" in finding.reason


def test_an_epoll_that_watches_a_process_is_named(tmp_path: Path) -> None:
    def set_up() -> list[int]:
        epoll, process = select.epoll(), os.pidfd_open(os.getpid())
        epoll.register(process, select.EPOLLIN)
        return [os.dup2(epoll.fileno(), 80), process]

    found = findings_of(set_up, tmp_path / "images")
    assert {finding.reason.partition(", ")[2] for finding in found} == {"a process, which is not supported yet"}
