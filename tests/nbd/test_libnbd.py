# SPDX-License-Identifier: Apache-2.0
"""python3-libnbd with strict mode off: a good client library made to send what it must not."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.nbd.exports import DIRTY
from tests.nbd.serve import SIZE, served

MIB = 1 << 20


@pytest.fixture
def uri(short_dir: Path) -> Iterator[str]:
    with served(short_dir / "s") as uri:
        yield uri


@pytest.fixture
def handle(libnbd: ModuleType, uri: str) -> Iterator[Any]:
    handle = libnbd.NBD()
    handle.set_strict_mode(0)
    handle.add_meta_context("base:allocation")
    handle.add_meta_context(DIRTY)
    handle.connect_uri(uri)
    yield handle
    handle.shutdown()


def test_forbidden_requests_get_their_errors_and_the_connection_goes_on(libnbd: ModuleType, handle: Any) -> None:
    attempts = [
        (errno.EINVAL, lambda: handle.pread(512, SIZE)),
        (errno.EINVAL, lambda: handle.pread(512, 1 << 62)),
        (errno.ENOSPC, lambda: handle.pwrite(bytearray(512), SIZE - 1)),
        (errno.ENOSPC, lambda: handle.zero(512, SIZE)),
        (errno.EINVAL, lambda: handle.trim(0, 0)),
        (errno.EINVAL, lambda: handle.cache(0, 0)),
        (errno.EINVAL, lambda: handle.pwrite(bytearray(512), 0, 0x8000)),
        (errno.EINVAL, lambda: handle.flush(0x4000)),
        (errno.EINVAL, lambda: handle.pread(512, 0, libnbd.CMD_FLAG_NO_HOLE)),
        (errno.EINVAL, lambda: handle.block_status(0, 0, lambda *_: None)),
        (errno.EINVAL, lambda: handle.block_status(SIZE + 1, 0, lambda *_: None)),
        (errno.ENOTSUP, lambda: handle.zero(4096, 0, libnbd.CMD_FLAG_FAST_ZERO | libnbd.CMD_FLAG_NO_HOLE)),
    ]
    for expected, attempt in attempts:
        with pytest.raises(libnbd.Error) as caught:
            attempt()
        assert caught.value.errnum == expected
        assert handle.pread(4, 0) == b"aaaa"


def test_oversized_write(libnbd: ModuleType, handle: Any) -> None:
    with pytest.raises(libnbd.Error) as caught:
        handle.pwrite(bytearray(40 * MIB), 0)
    assert caught.value.errnum in (errno.ENOSPC, errno.EINVAL)


def test_structured_read_sees_holes(libnbd: ModuleType, handle: Any) -> None:
    chunks = []
    handle.pread_structured(2 * MIB, 0, lambda data, offset, status, error: chunks.append((offset, len(data), status)))
    assert {status for offset, _, status in chunks if offset < MIB} == {libnbd.READ_DATA}
    assert {status for offset, _, status in chunks if offset >= MIB} == {libnbd.READ_HOLE}
    assert sum(length for _, length, _ in chunks) == 2 * MIB


def test_block_status_of_all_contexts_in_one_reply(handle: Any) -> None:
    seen: dict[str, tuple[int, list[int]]] = {}
    handle.block_status(SIZE, 0, lambda context, offset, entries, error: seen.update({context: (offset, entries)}))
    assert seen == {
        "base:allocation": (0, [MIB, 0, 7 * MIB, 3]),
        DIRTY: (0, [65536, 0, 65536, 1, SIZE - 2 * 65536, 0]),
    }


def test_option_negotiation(libnbd: ModuleType, uri: str) -> None:
    handle = libnbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    names: list[str] = []
    handle.opt_list(lambda name, description: names.append(name))
    assert names == ["disk"]
    contexts: list[str] = []
    handle.add_meta_context("qemu:")
    handle.opt_list_meta_context(contexts.append)
    assert contexts == [DIRTY, "qemu:allocation-depth"]
    handle.opt_info()
    assert handle.get_size() == SIZE
    handle.set_export_name("nothing")
    with pytest.raises(libnbd.Error):
        handle.opt_info()
    handle.opt_abort()


@pytest.mark.parametrize("structured", [True, False])
def test_old_and_new_replies_carry_the_same_data(libnbd: ModuleType, uri: str, structured: bool) -> None:
    handle = libnbd.NBD()
    handle.set_request_structured_replies(structured)
    handle.connect_uri(uri)
    assert handle.get_structured_replies_negotiated() == structured
    handle.pwrite(b"pattern!" * 1000, 12345)
    assert handle.pread(8000, 12345) == b"pattern!" * 1000
    assert handle.pread(SIZE, 0)[:MIB].count(b"a") > MIB - 8001
    handle.shutdown()


def test_many_requests_in_flight(libnbd: ModuleType, handle: Any) -> None:
    buffers = [libnbd.Buffer(65536) for _ in range(64)]
    cookies = [handle.aio_pread(buffer, number * 65536) for number, buffer in enumerate(buffers)]
    while cookies:
        handle.poll(-1)
        cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]
    assert [buffer.to_bytearray()[:1] for buffer in buffers] == [b"a"] * 16 + [b"\0"] * 48
