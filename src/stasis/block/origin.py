# SPDX-License-Identifier: Apache-2.0
"""The protected block device or image file, and how its bytes are read and written.

Direct I/O is used where the origin allows it; batches then go to the kernel by one io_uring call. What is not
aligned to the sector goes through a second, buffered descriptor of the same file, which the kernel keeps
coherent with direct I/O (it writes cached pages back before a direct read and drops them after a direct write).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from errno import EIO, ENODEV, ENOTSUP, EOPNOTSUPP
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from stasis.block.changemap import Identity
from stasis.block.mapformat import NO_FS_MARK
from stasis.linux import blockdev, files, memory, uring
from stasis.linux.iobuffer import IoBuffer

Request = tuple[int, int, int]

BOUNCE_SIZE = 2 << 20
ZERO_STEP = 1 << 20
LARGE = 64 << 10
"""From this length on a cached read costs io_uring a quarter more than preadv (nbdcopy of 1 GiB: 0.25 s against
0.19 s), and one that is not cached is spread over the disk by the kernel's read-ahead."""
DISCARD_STEP = 256 << 20
_ZEROS = bytes(ZERO_STEP)

P = ParamSpec("P")


def _enodev_once_removed(call: Callable[Concatenate[Origin, P], None]) -> Callable[Concatenate[Origin, P], None]:
    """Of I/O on a device that was removed the kernel says many things: an early end, ENOSPC, EINVAL, EIO."""

    @wraps(call)
    def checked(origin: Origin, /, *arguments: P.args, **named: P.kwargs) -> None:
        try:
            call(origin, *arguments, **named)
        except OSError as error:
            if origin.is_gone:
                raise OSError(ENODEV, "the block device was removed", origin.path) from error
            raise

    return checked


class Origin:
    """An open origin. `size` in bytes, `sector` its logical block size, `direct` whether direct I/O is used."""

    def __init__(self, path: str, fd: int, buffered_fd: int | None = None) -> None:
        self.path, self.fd = path, fd
        self.direct = buffered_fd is not None
        self.buffered_fd = fd if buffered_fd is None else buffered_fd
        self.is_device = blockdev.is_block_device(fd)
        self.size = blockdev.size(fd) if self.is_device else os.fstat(fd).st_size
        self.sector = blockdev.logical_block_size(fd) if self.is_device else (file_alignment(fd) if self.direct else 1)
        self._ring = uring.Ring() if uring.Ring.available() else None
        self._bounce: IoBuffer | None = None

    def close(self) -> None:
        """Give both descriptors and the buffers back."""
        if self._ring is not None:
            self._ring.close()
        if self._bounce is not None:
            self._bounce.close()
        for fd in {self.fd, self.buffered_fd}:
            os.close(fd)

    def current_size(self) -> int:
        """The size now; it differs from `size` when the origin was resized meanwhile."""
        return blockdev.size(self.fd) if self.is_device else os.fstat(self.fd).st_size

    @property
    def is_gone(self) -> bool:
        """Whether it is a block device that was removed: the kernel then says that its size is 0."""
        return self.is_device and not self.current_size()

    def identity(self) -> Identity:
        """What the origin shows of itself, to tell later whether somebody else wrote to it."""
        info = os.fstat(self.fd)
        if not self.is_device:
            return Identity(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
        counters = blockdev.write_counters(self.fd)
        return Identity(
            info.st_rdev, blockdev.disk_sequence(self.fd) or 0, self.size, -1 if counters is None else counters[1]
        )

    def fs_mark(self) -> bytes:
        """A digest of what its file system writes whenever it is mounted for writing; NO_FS_MARK for an image file, or
        if there is nothing that tells. Takes as long as reading the log of an xfs."""
        if not self.is_device:
            return NO_FS_MARK
        from hashlib import sha256  # not loaded before a worker serves

        from stasis.linux import fsmarks

        try:
            mark = fsmarks.read_from(self.fd)
        except OSError:
            mark = ""
        return sha256(mark.encode()).digest() if mark else NO_FS_MARK

    # -- reading ----------------------------------------------------------------------------------

    @_enodev_once_removed
    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        """Fill the buffer at each request's position. OSError EIO when the origin ends early."""
        if self._ring is None or (not self.direct and (len(requests) == 1 or requests[0][1] >= LARGE)):
            self._read_plain(buffer, requests)
        else:
            self._read_ring(buffer, requests)

    def _read_plain(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        mask, base = self.sector - 1, buffer.address
        for request in requests:
            offset, length, position = request
            odd = (offset | length | (base + position)) & mask
            _transfer(os.preadv, self.buffered_fd if odd else self.fd, buffer.view, [request])

    def _read_ring(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        # One io_uring call for the batch: as fast as preadv on cached pages, and what is not cached or goes past the
        # cache is fetched side by side (4 KiB random at depth 16, cold: three times preadv's rate).
        mask, base = self.sector - 1, buffer.address
        operations, odd = [], []
        for request in requests:
            offset, length, position = request
            if (offset | length | (base + position)) & mask:
                odd.append(request)
            else:
                operations.append((uring.OP_READ, self.fd, offset, base + position, length))
        self._run(operations)
        if odd:
            _transfer(os.preadv, self.buffered_fd, buffer.view, odd)

    # -- writing ----------------------------------------------------------------------------------

    @_enodev_once_removed
    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        """Write each request's data from the buffer."""
        if self.direct:
            self._write_direct(buffer, requests)
        else:
            _transfer(os.pwritev, self.fd, buffer.view, requests)

    def _write_direct(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        if len(requests) > 1 and _overlap(requests):
            # Operations of one ring call have no order among themselves.
            for request in requests:
                self._write_direct(buffer, [request])
            return
        mask, base = self.sector - 1, buffer.address
        bounce = self._bounce_buffer()
        operations: list[uring.Operation] = []
        used = 0
        for request in requests:
            offset, length, position = request
            if (offset | length) & mask:
                self._run(operations)
                operations, used = [], 0
                _transfer(os.pwritev, self.buffered_fd, buffer.view, [request])
                continue
            address = base + position
            if address & mask:
                if used + length > bounce.size:
                    self._run(operations)
                    operations, used = [], 0
                if length > bounce.size:
                    _transfer(os.pwritev, self.buffered_fd, buffer.view, [request])
                    continue
                bounce.view[used : used + length] = buffer.view[position : position + length]
                address = bounce.address + used
                used += length
            if operations and _follows(operations[-1], offset, address):
                operation, fd, start, first, before = operations[-1]
                operations[-1] = (operation, fd, start, first, before + length)
            else:
                operations.append((uring.OP_WRITE, self.fd, offset, address, length))
        self._run(operations)

    def _bounce_buffer(self) -> IoBuffer:
        if self._bounce is None:
            self._bounce = IoBuffer(BOUNCE_SIZE)
        return self._bounce

    def _run(self, operations: Sequence[uring.Operation]) -> None:
        """Do aligned operations: all at once by io_uring, or one after the other where there is none."""
        if not operations:
            return
        if self._ring is not None:
            results = self._ring.run(operations)
        else:
            results = [_plain(operation) for operation in operations]
        for (operation, fd, offset, address, length), result in zip(operations, results, strict=True):
            while 0 < result < length:
                offset, address, length = offset + result, address + result, length - result
                result = _plain((operation, fd, offset, address, length))
            if result != length:
                raise OSError(-result if result < 0 else EIO, "origin I/O failed", self.path)

    # -- the rest ---------------------------------------------------------------------------------

    @_enodev_once_removed
    def flush(self) -> None:
        """Make everything written durable."""
        os.fdatasync(self.fd)
        if self.is_gone:
            raise OSError(EIO, "what was written last may be lost", self.path)  # the kernel may see nothing to do

    def prefetch(self, offset: int, length: int) -> None:
        """Bring a range into the page cache in the background; nothing to do with direct I/O."""
        if not self.direct:
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, holds data) covering a range; a block device is all data."""
        if self.is_device:
            return iter([(offset, length, True)])
        return files.data_extents(self.buffered_fd, offset, length)

    @_enodev_once_removed
    def discard(self, offset: int, length: int) -> None:
        """Give space back; an origin that cannot is left as it is."""
        try:
            if not self.is_device:
                files.punch_hole(self.fd, offset, length)
            elif aligned := _aligned(offset, length, self.sector):
                blockdev.discard(self.fd, *aligned)
        except OSError as error:
            if error.errno not in (EOPNOTSUPP, ENOTSUP):
                raise

    @_enodev_once_removed
    def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Make a range read as zeroes. With `fast` OSError ENOTSUP where that means writing them."""
        try:
            if self.is_device:
                if fast:
                    raise OSError(ENOTSUP, "zeroing a block device may be slow")
                self._zero_device(offset, length)
            elif punch:
                files.punch_hole(self.fd, offset, length)
            else:
                files.zero_range(self.fd, offset, length, keep_size=True)
        except OSError as error:
            if error.errno not in (EOPNOTSUPP, ENOTSUP) or fast:
                raise
            self._write_zeroes(offset, length)

    def _zero_device(self, offset: int, length: int) -> None:
        start, count = _aligned(offset, length, self.sector) or (offset, 0)
        if count:
            blockdev.zero_out(self.fd, start, count)
        self._write_zeroes(offset, start - offset if count else length)
        self._write_zeroes(start + count, offset + length - start - count if count else 0)

    def _write_zeroes(self, offset: int, length: int) -> None:
        while length:
            done = os.pwrite(self.buffered_fd, memoryview(_ZEROS)[: min(length, ZERO_STEP)], offset)
            offset, length = offset + done, length - done


def _plain(operation: uring.Operation) -> int:
    """One operation by pread or pwrite, with the result that io_uring would give."""
    kind, fd, offset, address, length = operation
    place = memory.view_at(address, length)
    try:
        return os.preadv(fd, [place], offset) if kind == uring.OP_READ else os.pwritev(fd, [place], offset)
    except OSError as error:
        return -(error.errno or EIO)


def _overlap(requests: Sequence[Request]) -> bool:
    end = 0
    for offset, length, _ in sorted(requests):
        if offset < end:
            return True
        end = offset + length
    return False


def _follows(operation: uring.Operation, offset: int, address: int) -> bool:
    _, _, start, first, length = operation
    return start + length == offset and first + length == address


def _aligned(offset: int, length: int, sector: int) -> tuple[int, int] | None:
    start = -(-offset // sector) * sector
    end = (offset + length) // sector * sector
    return (start, end - start) if end > start else None


def _transfer(call: files.Vectored, fd: int, view: memoryview, requests: Sequence[Request]) -> None:
    """preadv or pwritev each request's place in `view`; neighbours on the origin become one call."""
    count, index = len(requests), 0
    while index < count:
        offset, length, position = requests[index]
        index += 1
        places = [view[position : position + length]]
        end = offset + length
        while index < count and requests[index][0] == end and len(places) < 64:
            _, more, position = requests[index]
            places.append(view[position : position + more])
            end += more
            index += 1
        done = call(fd, places, offset)
        if done != end - offset:
            files.transfer_rest(call, fd, places, offset, done)


def describe(origin: Origin) -> dict[str, Any]:
    """An origin for JSON."""
    return {"path": origin.path, "size": origin.size, "sector": origin.sector, "direct": origin.direct}


def file_alignment(fd: int) -> int:
    """Alignment that direct I/O on a regular file needs: the file system's block size is always enough."""
    return max(512, min(4096, os.fstatvfs(fd).f_bsize))
