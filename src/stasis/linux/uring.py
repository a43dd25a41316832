# SPDX-License-Identifier: Apache-2.0
"""io_uring as a batch call: many reads and writes by one system call (include/uapi/linux/io_uring.h).

A ring belongs to one thread of one process. After fork() a child must not use its parent's ring: both would
write the same shared queues. The descriptor is close-on-exec.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Self

from stasis.linux import libc

__all__ = ["OP_FSYNC", "OP_READ", "OP_WRITE", "Operation", "Ring"]

SYS_io_uring_setup = 425  # the same number on every architecture
SYS_io_uring_enter = 426

OP_FSYNC = 3  # IORING_OP_*
OP_READ = 22
OP_WRITE = 23

IORING_SETUP_SUBMIT_ALL = 1 << 7  # 5.18: a bad entry does not end the submission of those behind it
IORING_SETUP_COOP_TASKRUN = 1 << 8  # 5.19: no interrupt to the submitter, it comes by anyway
IORING_ENTER_GETEVENTS = 1 << 0
IORING_FEAT_SINGLE_MMAP = 1 << 0
IORING_OFF_SQ_RING = 0
IORING_OFF_CQ_RING = 0x8000000
IORING_OFF_SQES = 0x10000000

# struct io_uring_sqe up to user_data: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data.
# The other 24 of its 64 bytes stay zero as mapped.
SQE = struct.Struct("=BBHiQQIIQ")
SQE_SHIFT = 6
CQE = struct.Struct("=QiI")  # struct io_uring_cqe: user_data, res, flags
CQE_SHIFT = 4
COUNTER_MASK = 0xFFFFFFFF

_syscall = libc.syscall

Operation = tuple[int, int, int, int, int]  # opcode, fd, file offset, memory address, length in bytes


class _RingOffsets(ctypes.Structure):
    """struct io_sqring_offsets and struct io_cqring_offsets, which differ in the names of two fields only."""

    _fields_ = [
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("ring_mask", ctypes.c_uint32),
        ("ring_entries", ctypes.c_uint32),
        ("flags_or_overflow", ctypes.c_uint32),
        ("dropped_or_cqes", ctypes.c_uint32),
        ("array_or_flags", ctypes.c_uint32),
        ("resv1", ctypes.c_uint32),
        ("user_addr", ctypes.c_uint64),
    ]


class _Parameters(ctypes.Structure):
    """struct io_uring_params."""

    _fields_ = [
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        ("sq_off", _RingOffsets),
        ("cq_off", _RingOffsets),
    ]


def _setup(entries: int) -> tuple[int, _Parameters]:
    """io_uring_setup with the flags that help where known. Raises OSError: ENOSYS, EPERM, ENOMEM."""
    for flags in (IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN, 0):
        parameters = _Parameters(flags=flags)
        fd = _syscall(SYS_io_uring_setup, entries, ctypes.addressof(parameters), 0, 0, 0, 0)
        if fd >= 0:
            return fd, parameters
        if ctypes.get_errno() != errno.EINVAL:
            break
    raise libc.error(ctypes.get_errno(), "io_uring_setup")


@functools.cache
def _probe() -> bool:
    try:
        with Ring(2) as ring:
            return len(ring.run([])) == 0
    except OSError:
        return False


class Ring:
    """Submission and completion queue of entries operations at a time."""

    def __init__(self, entries: int = 256) -> None:
        self._cleanup = contextlib.ExitStack()
        with contextlib.ExitStack() as cleanup:
            self.fd, parameters = _setup(entries)
            cleanup.callback(os.close, self.fd)
            self.entries: int = parameters.sq_entries
            self._map(parameters, cleanup)
            self._cleanup = cleanup.pop_all()

    @classmethod
    def available(cls) -> bool:
        """Whether this kernel, its settings and the sandbox around us allow io_uring; asked once."""
        return _probe()

    def _map(self, parameters: _Parameters, cleanup: contextlib.ExitStack) -> None:
        submission, completion = parameters.sq_off, parameters.cq_off
        sq_size = submission.array_or_flags + parameters.sq_entries * 4
        cq_size = completion.dropped_or_cqes + (parameters.cq_entries << CQE_SHIFT)
        if parameters.features & IORING_FEAT_SINGLE_MMAP:  # since Linux 5.4
            sq_map = cq_map = self._mmap(max(sq_size, cq_size), IORING_OFF_SQ_RING, cleanup)
        else:
            sq_map = self._mmap(sq_size, IORING_OFF_SQ_RING, cleanup)
            cq_map = self._mmap(cq_size, IORING_OFF_CQ_RING, cleanup)
        self._sqes = self._mmap(parameters.sq_entries << SQE_SHIFT, IORING_OFF_SQES, cleanup)
        self._sq = cleanup.enter_context(memoryview(sq_map)[: sq_size // 4 * 4].cast("I"))
        self._cq = cleanup.enter_context(memoryview(cq_map)[: cq_size // 4 * 4].cast("I"))
        self._cqes = cleanup.enter_context(memoryview(cq_map)[completion.dropped_or_cqes : cq_size])
        self._sq_head, self._sq_tail = submission.head // 4, submission.tail // 4
        self._cq_head, self._cq_tail = completion.head // 4, completion.tail // 4
        self._sq_mask = self._sq[submission.ring_mask // 4]
        self._cq_mask = self._cq[completion.ring_mask // 4]
        array = submission.array_or_flags // 4
        for index in range(parameters.sq_entries):  # entry i of the ring is always submission i
            self._sq[array + index] = index

    def _mmap(self, length: int, offset: int, cleanup: contextlib.ExitStack) -> mmap.mmap:
        mapping = mmap.mmap(self.fd, length, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=offset)
        return cleanup.enter_context(mapping)

    def run(self, operations: Sequence[Operation]) -> list[int]:
        """Run all operations at the same time and wait for all of them.

        Returns their results in order: bytes done (perhaps fewer than asked), or -errno. The order in which
        they run is not defined. Raises OSError when the ring itself fails; nothing is in flight then.
        """
        if len(operations) <= self.entries:
            return self._run(operations)
        results: list[int] = []
        for start in range(0, len(operations), self.entries):
            results += self._run(operations[start : start + self.entries])
        return results

    def _run(self, operations: Sequence[Operation]) -> list[int]:
        # Hot: local names, one struct per entry, one system call per batch.
        pack, sqes, mask = SQE.pack_into, self._sqes, self._sq_mask
        place = self._sq[self._sq_tail]
        index = 0
        for opcode, fd, offset, address, length in operations:
            pack(sqes, (place & mask) << SQE_SHIFT, opcode, 0, 0, fd, offset, address, length, 0, index)
            place += 1
            index += 1
        results = [-errno.ECANCELED] * index
        self._sq[self._sq_tail] = place & COUNTER_MASK
        pending = submit = index
        try:
            while pending:
                if self._enter(submit, pending) < 0:
                    self._tolerate(ctypes.get_errno(), pending)
                pending -= self._complete(results)
                submit = place - self._sq[self._sq_head] & COUNTER_MASK
        finally:
            if pending:
                self._abandon(pending, results)
        return results

    def _enter(self, submit: int, wait_for: int) -> int:
        return _syscall(SYS_io_uring_enter, self.fd, submit, wait_for, IORING_ENTER_GETEVENTS, 0, 0)

    def _complete(self, results: list[int]) -> int:
        """Enter what has completed at its place in results; returns how many those were."""
        head, tail = self._cq[self._cq_head], self._cq[self._cq_tail]
        count: int = tail - head & COUNTER_MASK
        first = head & self._cq_mask
        last = min(first + count, self._cq_mask + 1)
        for place, result, _ in CQE.iter_unpack(self._cqes[first << CQE_SHIFT : last << CQE_SHIFT]):
            results[place] = result
        for place, result, _ in CQE.iter_unpack(self._cqes[: first + count - last << CQE_SHIFT]):
            results[place] = result
        self._cq[self._cq_head] = tail
        return count

    def _tolerate(self, code: int, pending: int) -> None:
        """EINTR: enter again with what is left. EAGAIN, EBUSY: room will come while anything is in flight."""
        unsubmitted = self._sq[self._sq_tail] - self._sq[self._sq_head] & COUNTER_MASK
        if code == errno.EINTR or (code in (errno.EAGAIN, errno.EBUSY) and pending > unsubmitted):
            return
        raise libc.error(code, "io_uring_enter")

    def _abandon(self, pending: int, results: list[int]) -> None:
        """Take back what was not submitted and wait for the rest, which uses the caller's memory."""
        head, tail = self._sq[self._sq_head], self._sq[self._sq_tail]
        self._sq[self._sq_tail] = head
        pending -= tail - head & COUNTER_MASK
        while True:
            pending -= self._complete(results)
            if pending <= 0:
                return
            self._enter(0, pending)

    def close(self) -> None:
        """Give the ring and its mappings back; may be called again."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
