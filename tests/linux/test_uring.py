# SPDX-License-Identifier: Apache-2.0
"""io_uring batches against what pread and pwrite say, and what is left when they go wrong."""

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux import uring
from stasis.linux.uring import OP_READ, OP_WRITE, Ring

BLOCK = 4096
COUNT = 100

pytestmark = pytest.mark.skipif(not Ring.available(), reason="io_uring is not allowed here")


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(number, b"".join(bytes([block]) * BLOCK for block in range(COUNT)), 0)
    yield number
    os.close(number)


class Memory:
    def __init__(self) -> None:
        self.map = mmap.mmap(-1, COUNT * BLOCK)
        self.byte = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self.byte)

    def close(self) -> None:
        del self.byte
        self.map.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


@pytest.mark.parametrize("entries", [1, 7, 128])
def test_reads_fill_memory_whatever_the_rings_size(fd: int, memory: Memory, entries: int) -> None:
    with Ring(entries) as ring:
        for _ in range(3):  # the queues wrap
            memory.map[:] = bytes(COUNT * BLOCK)
            operations = [
                (OP_READ, fd, (COUNT - 1 - block) * BLOCK, memory.address + block * BLOCK, BLOCK)
                for block in range(COUNT)
            ]
            assert ring.run(operations) == [BLOCK] * COUNT
            assert [memory.map[block * BLOCK] for block in range(COUNT)] == list(range(COUNT - 1, -1, -1))


def test_writes_reach_the_file(fd: int, memory: Memory) -> None:
    memory.map[:] = os.urandom(COUNT * BLOCK)
    with Ring(16) as ring:
        operations = [
            (OP_WRITE, fd, block * BLOCK, memory.address + block * BLOCK, BLOCK) for block in range(COUNT)
        ]
        assert ring.run(operations) == [BLOCK] * COUNT
    assert os.pread(fd, COUNT * BLOCK, 0) == memory.map[:]


def test_each_operation_has_its_own_result(fd: int, memory: Memory) -> None:
    operations = [
        (OP_READ, fd, 0, memory.address, BLOCK),
        (OP_READ, -1, 0, memory.address, BLOCK),
        (255, fd, 0, memory.address, BLOCK),
        (OP_READ, fd, COUNT * BLOCK - 10, memory.address, BLOCK),
        (OP_READ, fd, COUNT * BLOCK, memory.address, BLOCK),
        (OP_READ, fd, BLOCK, memory.address + BLOCK, BLOCK),
    ]
    with Ring(8) as ring:
        assert ring.run(operations) == [BLOCK, -errno.EBADF, -errno.EINVAL, 10, 0, BLOCK]
        assert ring.run([]) == []


def test_without_submit_all_an_invalid_entry_does_not_lose_the_others(
    fd: int, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on kernels before 5.18, where submission stops behind a bad entry."""
    monkeypatch.setattr(uring, "IORING_SETUP_SUBMIT_ALL", 0)
    monkeypatch.setattr(uring, "IORING_SETUP_COOP_TASKRUN", 0)
    good = (OP_READ, fd, 0, memory.address, BLOCK)
    with Ring(8) as ring:
        assert ring.run([good, (255, fd, 0, 0, 0), good, good]) == [BLOCK, -errno.EINVAL, BLOCK, BLOCK]


def test_signals_do_not_disturb_a_batch(memory: Memory) -> None:
    """A read of a pipe waits until the signal handler, run between two calls into the kernel, writes it."""
    read_end, write_end = os.pipe()
    seen = []

    def handler(_number: int, _frame: object) -> None:
        seen.append(os.write(write_end, b"wake"))

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        with Ring(4) as ring:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            assert ring.run([(OP_READ, read_end, 2**64 - 1, memory.address, 16)]) == [4]
    finally:
        signal.signal(signal.SIGALRM, previous)
        os.close(read_end)
        os.close(write_end)
    assert seen == [4]
    assert memory.map[:4] == b"wake"


def test_exception_in_a_signal_handler_leaves_nothing_in_flight(fd: int, memory: Memory) -> None:
    read_end, write_end = os.pipe()

    def handler(_number: int, _frame: object) -> None:
        os.write(write_end, b"done")
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        with Ring(4) as ring:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                ring.run([(OP_READ, read_end, 2**64 - 1, memory.address, 16)])
            assert memory.map[:4] == b"done"
            assert ring.run([(OP_READ, fd, BLOCK, memory.address, 1)]) == [1]
    finally:
        signal.signal(signal.SIGALRM, previous)
        os.close(read_end)
        os.close(write_end)


def test_ring_failure_raises_and_takes_back_what_was_not_submitted(
    fd: int, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ring(4) as ring:
        with monkeypatch.context() as patch:
            patch.setattr(uring, "SYS_io_uring_enter", 0x7FFF)  # ENOSYS
            with pytest.raises(OSError, match="io_uring_enter") as caught:
                ring.run([(OP_READ, fd, 0, memory.address, BLOCK)])
            assert caught.value.errno == errno.ENOSYS
        assert ring.run([(OP_READ, fd, 5 * BLOCK, memory.address, 1)]) == [1]
        assert memory.map[0] == 5


def test_close_gives_descriptor_and_mappings_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    ring = Ring(8)
    assert set(os.listdir("/proc/self/fd")) > before
    ring.close()
    ring.close()
    assert set(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert "io_uring" not in maps.read()


def test_ring_is_not_inherited_over_exec() -> None:
    with Ring(8) as ring:
        assert not os.get_inheritable(ring.fd)
