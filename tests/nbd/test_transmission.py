# SPDX-License-Identifier: Apache-2.0
"""Every request of the transmission phase, and every way in which it can be refused or fail."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Iterator

import pytest

from stasis.nbd import listeners
from stasis.nbd import protocol as p
from stasis.nbd.transmission import CAPACITY
from tests.nbd.exports import DIRTY, MemoryExport
from tests.nbd.wire import CLIENT_FLAGS, Chunk, Pair, Simple, contexts, option, parse_replies, request

STRUCTURED = option(p.NBD_OPT_STRUCTURED_REPLY)
MIB = 1 << 20


@pytest.fixture
def export(seed: int) -> MemoryExport:
    """A written 1 MiB disk: no holes."""
    export = MemoryExport(MIB)
    export.data[:] = random.Random(seed).randbytes(MIB)
    export.holes = bytearray(len(export.holes))
    return export


@pytest.fixture
def simple(export: MemoryExport) -> Iterator[Pair]:
    with Pair(export) as pair:
        pair.negotiate()
        yield pair


@pytest.fixture
def structured(export: MemoryExport) -> Iterator[Pair]:
    with Pair(export) as pair:
        pair.negotiate(STRUCTURED, contexts("disk", *export.contexts()))
        yield pair


def assemble(replies: list[Simple | Chunk], offset: int, length: int) -> bytes:
    """The data of one structured read; checks that chunks neither overlap nor leave the request, and end once."""
    data, covered = bytearray(length), 0
    for reply in replies:
        assert isinstance(reply, Chunk)
        if reply.kind == p.NBD_REPLY_TYPE_OFFSET_DATA:
            start, part = struct.unpack(">Q", reply.payload[:8])[0], reply.payload[8:]
        elif reply.kind == p.NBD_REPLY_TYPE_OFFSET_HOLE:
            start, size = struct.unpack(">QI", reply.payload)
            part = bytes(size)
        else:
            assert (reply.kind, reply.payload) == (p.NBD_REPLY_TYPE_NONE, b"")
            continue
        assert offset <= start
        assert start + len(part) <= offset + length
        data[start - offset : start - offset + len(part)] = part
        covered += len(part)
    assert covered == length
    assert [reply.flags for reply in replies if isinstance(reply, Chunk)] == [0] * (len(replies) - 1) + [1]
    return bytes(data)


def only(pair: Pair, message: bytes, **lengths: int) -> Simple | Chunk:
    replies = parse_replies(pair.exchange(message), {1: lengths["length"]} if lengths else None)
    assert len(replies) == 1
    return replies[0]


def test_simple_read_golden_bytes(simple: Pair, export: MemoryExport) -> None:
    message = bytes.fromhex("25609513 0000 0000 0102030405060708 0000000000000200 00000008")
    expected = bytes.fromhex("67446698 00000000 0102030405060708") + export.data[512:520]
    assert simple.exchange(message) == expected


def test_structured_read_golden_bytes(structured: Pair, export: MemoryExport) -> None:
    message = bytes.fromhex("25609513 0000 0000 0102030405060708 0000000000000200 00000008")
    expected = bytes.fromhex("668e33ef 0001 0001 0102030405060708 00000010 0000000000000200") + export.data[512:520]
    assert structured.exchange(message) == expected


@pytest.mark.parametrize("socket_buffer", [4096, 4 << 20])
@pytest.mark.parametrize("alignment", [1, 512, 4096])
@pytest.mark.parametrize("options", [(), (STRUCTURED,)], ids=["simple", "structured"])
def test_reads_of_a_batch_have_their_own_data(
    export: MemoryExport,
    alignment: int,
    options: tuple[bytes, ...],
    seed: int,
    socket_buffer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listeners, "_SOCKET_BUFFER", socket_buffer)
    export.alignment = alignment
    export.reports_holes = False
    draw = random.Random(seed)
    wanted = {n: (draw.randrange(MIB - 9000), draw.randrange(1, 9000)) for n in range(1, 400)}
    message = b"".join(request(p.NBD_CMD_READ, *place, cookie=cookie) for cookie, place in wanted.items())
    with Pair(export) as pair:
        pair.negotiate(*options)
        replies = parse_replies(pair.exchange(message), {n: length for n, (_, length) in wanted.items()})
    assert sorted(reply.cookie for reply in replies) == sorted(wanted)
    for reply in replies:
        offset, length = wanted[reply.cookie]
        data = reply.data if isinstance(reply, Simple) else reply.payload[8:]
        assert data == export.data[offset : offset + length]
    assert sum(count for name, count in export.calls if name == "read") == len(wanted)
    assert len(export.calls) < 60, "reads did not travel in batches"


def test_writes_of_a_batch_are_one_call(simple: Pair, export: MemoryExport) -> None:
    message = b"".join(request(p.NBD_CMD_WRITE, n * 8192, 4096, cookie=n, payload=bytes([n]) * 4096) for n in range(16))
    replies = parse_replies(simple.exchange(message))
    assert replies == [Simple(n, 0) for n in range(16)]
    assert all(export.data[n * 8192 : n * 8192 + 4096] == bytes([n]) * 4096 for n in range(16))
    assert export.calls == [("write", 16)]


@pytest.mark.parametrize("size", [MIB, CAPACITY - 1, CAPACITY, CAPACITY + 1, 2 * CAPACITY, 5 * MIB + 123, 32 * MIB])
def test_long_writes_and_reads_are_whole(size: int, seed: int) -> None:
    export = MemoryExport(33 * MIB)
    payload = random.Random(seed).randbytes(size)
    with Pair(export) as pair:
        pair.negotiate()
        head = request(p.NBD_CMD_WRITE, 7, size, cookie=5) + payload
        tail = request(p.NBD_CMD_READ, 7, size, cookie=6)
        write, read = parse_replies(pair.exchange(head + tail), {6: size})
        assert (write, read.cookie) == (Simple(5, 0), 6)
        assert isinstance(read, Simple)
        assert read.data == payload
        assert export.data[7 : 7 + size] == payload


@pytest.mark.parametrize("flags", [0, p.NBD_CMD_FLAG_DF])
def test_long_structured_reads(flags: int, seed: int) -> None:
    export = MemoryExport(8 * MIB)
    export.data[2 * MIB : 3 * MIB] = random.Random(seed).randbytes(MIB)
    export.holes[2 * MIB // 4096 : 3 * MIB // 4096] = bytes(MIB // 4096)
    with Pair(export) as pair:
        pair.negotiate(STRUCTURED)
        replies = parse_replies(pair.exchange(request(p.NBD_CMD_READ, MIB, 6 * MIB, flags=flags)))
    assert assemble(replies, MIB, 6 * MIB) == export.data[MIB : 7 * MIB]
    kinds = [reply.kind for reply in replies if isinstance(reply, Chunk)]
    if flags:
        assert kinds == [p.NBD_REPLY_TYPE_OFFSET_DATA, p.NBD_REPLY_TYPE_NONE]
    else:
        assert kinds.count(p.NBD_REPLY_TYPE_OFFSET_HOLE) == 2


def test_small_reads_do_not_ask_for_holes(structured: Pair, export: MemoryExport) -> None:
    export.holes = bytearray(b"\x01" * len(export.holes))
    export.data = bytearray(MIB)
    reply = only(structured, request(p.NBD_CMD_READ, 0, 32768))
    assert isinstance(reply, Chunk)
    assert reply.kind == p.NBD_REPLY_TYPE_OFFSET_DATA


def test_flush_comes_after_the_writes_before_it(simple: Pair, export: MemoryExport) -> None:
    write = request(p.NBD_CMD_WRITE, 0, 512, payload=bytes(512))
    assert len(parse_replies(simple.exchange(write + request(p.NBD_CMD_FLUSH, 0, 0) + write))) == 3
    assert [name for name, _ in export.calls] == ["write", "flush", "write"]


@pytest.mark.parametrize(
    ("kind", "length"), [(p.NBD_CMD_WRITE, 512), (p.NBD_CMD_WRITE, 2 * MIB), (p.NBD_CMD_TRIM, MIB), (6, MIB)]
)
def test_fua_flushes_before_the_reply(kind: int, length: int) -> None:
    export = MemoryExport(2 * MIB)
    with Pair(export) as pair:
        pair.negotiate()
        payload = bytes(length) if kind == p.NBD_CMD_WRITE else b""
        assert only(pair, request(kind, 0, length, flags=p.NBD_CMD_FLAG_FUA, payload=payload)) == Simple(1, 0)
    assert export.calls[-1] == ("flush", 1)


def test_fua_is_accepted_everywhere(structured: Pair, export: MemoryExport) -> None:
    for kind in (p.NBD_CMD_READ, p.NBD_CMD_CACHE, p.NBD_CMD_BLOCK_STATUS):
        replies = parse_replies(structured.exchange(request(kind, 0, 512, flags=p.NBD_CMD_FLAG_FUA)))
        assert all(not isinstance(r, Chunk) or not r.kind & p.NBD_REPLY_TYPE_FLAG_ERROR for r in replies)
    assert only(structured, request(p.NBD_CMD_FLUSH, 0, 0, flags=p.NBD_CMD_FLAG_FUA)) == Simple(1, 0)


def test_trim_zeroes_and_holes(simple: Pair, export: MemoryExport) -> None:
    assert only(simple, request(p.NBD_CMD_TRIM, 0, 65536)) == Simple(1, 0)
    assert only(simple, request(p.NBD_CMD_WRITE_ZEROES, 65536, 65536)) == Simple(1, 0)
    assert only(simple, request(p.NBD_CMD_WRITE_ZEROES, 131072, 65536, flags=p.NBD_CMD_FLAG_NO_HOLE)) == Simple(1, 0)
    assert [name for name, _ in export.calls] == ["trim", "punch", "zero"]
    assert export.data[: 3 * 65536] == bytes(3 * 65536)
    assert bytes(export.holes[:48]) == b"\x01" * 32 + bytes(16)


def test_fast_zero_fails_where_it_would_be_slow(simple: Pair, export: MemoryExport) -> None:
    before = bytes(export.data)
    flags = p.NBD_CMD_FLAG_FAST_ZERO
    slow = request(p.NBD_CMD_WRITE_ZEROES, 0, 4096, flags=flags | p.NBD_CMD_FLAG_NO_HOLE)
    assert only(simple, slow) == Simple(1, errno.ENOTSUP)
    assert export.data == before
    assert only(simple, request(p.NBD_CMD_WRITE_ZEROES, 0, 4096, flags=flags)) == Simple(1, 0)


def test_cache(simple: Pair, export: MemoryExport) -> None:
    assert only(simple, request(p.NBD_CMD_CACHE, 0, 65536)) == Simple(1, 0)
    assert export.calls == [("cache", 1)]


def test_block_status_answers_every_context(structured: Pair, export: MemoryExport) -> None:
    export.holes[0] = 1
    export.dirty[1] = 1
    replies = parse_replies(structured.exchange(request(p.NBD_CMD_BLOCK_STATUS, 0, 16384)))
    assert all(isinstance(r, Chunk) and r.kind == p.NBD_REPLY_TYPE_BLOCK_STATUS for r in replies)
    assert [r.flags for r in replies if isinstance(r, Chunk)] == [0, 0, 1]
    payloads = [r.payload for r in replies if isinstance(r, Chunk)]
    assert len({payload[:4] for payload in payloads}) == 3
    assert [list(p.EXTENT.iter_unpack(payload[4:])) for payload in payloads] == [
        [(4096, 3), (12288, 0)],
        [(4096, 0), (4096, 1), (8192, 0)],
        [(4096, 0), (12288, 1)],
    ]


def test_block_status_req_one(structured: Pair, export: MemoryExport) -> None:
    export.holes[0] = 1
    message = request(p.NBD_CMD_BLOCK_STATUS, 0, 16384, flags=p.NBD_CMD_FLAG_REQ_ONE)
    replies = parse_replies(structured.exchange(message))
    assert len(replies) == 3
    assert all(isinstance(reply, Chunk) and len(reply.payload) == 12 for reply in replies)


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "expected"),
    [
        (p.NBD_CMD_READ, MIB - 511, 512, 0, errno.EINVAL),
        (p.NBD_CMD_READ, 1 << 63, 512, 0, errno.EINVAL),
        (p.NBD_CMD_READ, 0, 0, 0, errno.EINVAL),
        (p.NBD_CMD_READ, 0, 512, p.NBD_CMD_FLAG_NO_HOLE, errno.EINVAL),
        (p.NBD_CMD_READ, 0, 512, 1 << 15, errno.EINVAL),
        (p.NBD_CMD_READ, 0, 512, p.NBD_CMD_FLAG_DF, errno.EINVAL),  # not negotiated here
        (p.NBD_CMD_TRIM, MIB, 512, 0, errno.EINVAL),
        (p.NBD_CMD_TRIM, 0, 0, 0, errno.EINVAL),
        (p.NBD_CMD_WRITE_ZEROES, MIB - 1, 2, 0, errno.ENOSPC),
        (p.NBD_CMD_WRITE_ZEROES, 0, 512, p.NBD_CMD_FLAG_DF, errno.EINVAL),
        (p.NBD_CMD_CACHE, MIB, 1, 0, errno.EINVAL),
        (p.NBD_CMD_FLUSH, 0, 1, 0, errno.EINVAL),
        (p.NBD_CMD_FLUSH, 1, 0, 0, errno.EINVAL),
        (p.NBD_CMD_BLOCK_STATUS, 0, 512, 0, errno.EINVAL),  # no contexts were negotiated
        (8, 0, 0, 0, errno.EINVAL),
        (0xFFFF, 1 << 60, 1 << 31, 0xFFFF, errno.EINVAL),
    ],
)
def test_refusals(simple: Pair, kind: int, offset: int, length: int, flags: int, expected: int) -> None:
    assert only(simple, request(kind, offset, length, flags=flags)) == Simple(1, expected)
    assert only(simple, request(p.NBD_CMD_READ, 0, 512), length=512)[1] == 0  # the connection goes on


@pytest.mark.parametrize(
    ("offset", "length", "flags", "expected"),
    [
        (MIB - 511, 512, 0, errno.ENOSPC),
        (1 << 63, 2 * MIB, 0, errno.ENOSPC),  # longer than the input buffer: consumed in pieces
        (0, 512, p.NBD_CMD_FLAG_NO_HOLE, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
    ],
)
def test_refused_writes_have_their_payload_consumed(
    simple: Pair, export: MemoryExport, offset: int, length: int, flags: int, expected: int
) -> None:
    before = bytes(export.data)
    message = request(p.NBD_CMD_WRITE, offset, length, flags=flags, payload=b"\x25\x60\x95\x13" * (length // 4))
    replies = parse_replies(simple.exchange(message + request(p.NBD_CMD_FLUSH, 0, 0, cookie=2)))
    assert replies == [Simple(1, expected), Simple(2, 0)]
    assert export.data == before


def test_requests_above_the_maximum_block() -> None:
    export = MemoryExport(4 * MIB)
    export.maximum_block = MIB
    with Pair(export) as pair:
        pair.negotiate(STRUCTURED)
        too_long = request(p.NBD_CMD_WRITE, 0, 2 * MIB, payload=bytes(2 * MIB))
        assert only(pair, too_long) == Simple(1, errno.EINVAL)
        for flags, expected in ((0, errno.EINVAL), (p.NBD_CMD_FLAG_DF, errno.EOVERFLOW)):
            reply = only(pair, request(p.NBD_CMD_READ, 0, 2 * MIB, flags=flags))
            assert isinstance(reply, Chunk)
            assert reply.payload[:4] == expected.to_bytes(4, "big")
        assert only(pair, request(p.NBD_CMD_TRIM, 0, 4 * MIB)) == Simple(1, 0)  # no payload, no limit
        pair.exchange(request(p.NBD_CMD_WRITE, 0, 2 * MIB + 1))
        assert pair.dropped


def test_read_only_export_refuses_changes(export: MemoryExport) -> None:
    export.read_only = True
    with Pair(export) as pair:
        pair.negotiate()
        for kind in (p.NBD_CMD_WRITE, p.NBD_CMD_TRIM, p.NBD_CMD_WRITE_ZEROES):
            payload = bytes(512) if kind == p.NBD_CMD_WRITE else b""
            assert only(pair, request(kind, 0, 512, payload=payload)) == Simple(1, errno.EPERM)


def test_unoffered_commands_are_refused(export: MemoryExport) -> None:
    export.can_trim = export.can_zero = export.can_cache = False
    with Pair(export) as pair:
        pair.negotiate()
        for kind in (p.NBD_CMD_TRIM, p.NBD_CMD_CACHE, p.NBD_CMD_WRITE_ZEROES):
            assert only(pair, request(kind, 0, 512)) == Simple(1, errno.EINVAL)


def test_minimum_block_is_enforced(export: MemoryExport) -> None:
    export.minimum_block = 512
    with Pair(export) as pair:
        pair.negotiate()
        assert only(pair, request(p.NBD_CMD_READ, 1, 512)) == Simple(1, errno.EINVAL)
        assert only(pair, request(p.NBD_CMD_READ, 0, 513)) == Simple(1, errno.EINVAL)
        assert only(pair, request(p.NBD_CMD_WRITE, 0, 100, payload=bytes(100))) == Simple(1, errno.EINVAL)
        assert only(pair, request(p.NBD_CMD_READ, 512, 512), length=512)[1] == 0


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.EIO, 5), (errno.ENOSPC, 28), (errno.EDQUOT, 28), (errno.EFBIG, 28), (errno.EROFS, 1), (errno.ENOMEM, 12),
     (errno.ESHUTDOWN, 108), (errno.ENXIO, 5), (errno.EUCLEAN, 5)],
)  # fmt: skip
def test_an_error_belongs_to_its_request(simple: Pair, export: MemoryExport, number: int, told: int) -> None:
    export.faults[10 * 4096] = number
    message = b"".join(request(p.NBD_CMD_READ, n * 4096, 4096, cookie=n) for n in range(16))
    message += b"".join(
        request(p.NBD_CMD_WRITE, n * 4096, 4096, cookie=100 + n, payload=b"w" * 4096) for n in range(16)
    )
    replies = parse_replies(simple.exchange(message), dict.fromkeys(range(16), 4096))
    errors = {reply.cookie: reply.error for reply in replies if isinstance(reply, Simple) and reply.error}
    assert errors == {10: told, 110: told}
    assert sorted(reply.cookie for reply in replies) == [*range(16), *range(100, 116)]


def test_structured_errors(structured: Pair, export: MemoryExport) -> None:
    export.faults[0] = errno.EIO
    for kind in (p.NBD_CMD_READ, p.NBD_CMD_BLOCK_STATUS):
        assert only(structured, request(kind, 0, 4096)) == Chunk(1, 1, p.NBD_REPLY_TYPE_ERROR, b"\0\0\0\x05\0\0")
    write = request(p.NBD_CMD_WRITE, 0, 512, payload=bytes(512))
    assert only(structured, write) == Simple(1, errno.EIO)


@pytest.mark.parametrize("kind", [p.NBD_CMD_TRIM, p.NBD_CMD_WRITE_ZEROES, p.NBD_CMD_CACHE])
def test_errors_in_later_steps_are_told(simple: Pair, export: MemoryExport, kind: int) -> None:
    export.faults[MIB - 1] = errno.EIO
    assert only(simple, request(kind, 0, MIB)) == Simple(1, errno.EIO)


def test_failed_flush_fails_what_asked_for_it(simple: Pair, export: MemoryExport) -> None:
    export.faults[-1] = errno.EIO
    assert only(simple, request(p.NBD_CMD_FLUSH, 0, 0)) == Simple(1, errno.EIO)
    fua = request(p.NBD_CMD_WRITE, 0, 512, flags=p.NBD_CMD_FLAG_FUA, payload=bytes(512))
    assert only(simple, fua) == Simple(1, errno.EIO)
    assert only(simple, request(p.NBD_CMD_TRIM, 0, 512, flags=p.NBD_CMD_FLAG_FUA)) == Simple(1, errno.EIO)


def test_long_write_that_fails_is_consumed() -> None:
    export = MemoryExport(8 * MIB)
    export.faults[3 * MIB] = errno.ENOSPC
    with Pair(export) as pair:
        pair.negotiate()
        message = request(p.NBD_CMD_WRITE, 0, 8 * MIB, payload=bytes(8 * MIB)) + request(
            p.NBD_CMD_FLUSH, 0, 0, cookie=2
        )
        assert parse_replies(pair.exchange(message)) == [Simple(1, errno.ENOSPC), Simple(2, 0)]


def test_simple_read_that_fails_midway_disconnects() -> None:
    export = MemoryExport(8 * MIB)
    export.faults[5 * MIB] = errno.EIO
    with Pair(export) as pair:
        pair.negotiate()
        data = pair.exchange(request(p.NBD_CMD_READ, 0, 8 * MIB))
        assert p.SIMPLE_REPLY.unpack_from(data)[1] == 0
        assert len(data) < 16 + 8 * MIB
        assert pair.dropped


def test_df_read_that_fails_midway_is_padded() -> None:
    export = MemoryExport(8 * MIB)
    export.faults[5 * MIB] = errno.EIO
    with Pair(export) as pair:
        pair.negotiate(STRUCTURED)
        data = pair.exchange(request(p.NBD_CMD_READ, 0, 8 * MIB, flags=p.NBD_CMD_FLAG_DF))
        content, error = parse_replies(data)
        assert isinstance(content, Chunk)
        assert len(content.payload) == 8 + 8 * MIB
        assert error == Chunk(1, 1, p.NBD_REPLY_TYPE_ERROR, b"\0\0\0\x05\0\0")


def test_structured_read_that_fails_midway_ends_in_an_error_chunk() -> None:
    export = MemoryExport(8 * MIB)
    export.reports_holes = False
    export.faults[5 * MIB] = errno.EIO
    with Pair(export) as pair:
        pair.negotiate(STRUCTURED)
        replies = parse_replies(pair.exchange(request(p.NBD_CMD_READ, 0, 8 * MIB)))
    assert replies[-1] == Chunk(1, 1, p.NBD_REPLY_TYPE_ERROR, b"\0\0\0\x05\0\0")
    assert len(replies) == 11  # ten pieces of 512 KiB before the fault


def test_bad_magic_drops_after_answering_what_came_before(simple: Pair) -> None:
    message = request(p.NBD_CMD_FLUSH, 0, 0) + b"\xff" * 28
    assert parse_replies(simple.exchange(message)) == [Simple(1, 0)]
    assert simple.dropped


def test_disconnect_answers_everything_first(simple: Pair, export: MemoryExport) -> None:
    message = request(p.NBD_CMD_READ, 0, 65536) + request(p.NBD_CMD_DISC, 0, 0)
    assert only(simple, message, length=65536)[2] == export.data[:65536]
    assert simple.dropped


def test_requests_that_come_with_the_last_option() -> None:
    with Pair(MemoryExport()) as pair:
        pair.exchange(CLIENT_FLAGS)
        data = pair.exchange(option(p.NBD_OPT_EXPORT_NAME, b"disk") + request(p.NBD_CMD_FLUSH, 0, 0))
        assert parse_replies(data[10:]) == [Simple(1, 0)]


def test_any_way_of_cutting_the_stream(simple: Pair, export: MemoryExport, seed: int) -> None:
    draw = random.Random(seed)
    stream = b"".join(
        request(p.NBD_CMD_WRITE, n * 4096, 3000, cookie=n, payload=bytes([n]) * 3000)
        + request(p.NBD_CMD_READ, n * 4096, 3000, cookie=1000 + n)
        for n in range(100)
    )
    answer = b""
    while stream:
        size = draw.choice((1, 27, 28, 29, 500, 20_000))
        answer += simple.exchange(stream[:size], turns=1)
        stream = stream[size:]
    replies = parse_replies(answer + simple.exchange(), {1000 + n: 3000 for n in range(100)})
    assert len(replies) == 200
    assert all(r.data == bytes([r.cookie - 1000]) * 3000 for r in replies if isinstance(r, Simple) and r.cookie >= 1000)


def test_others_are_served_between_the_steps_of_a_trim(export: MemoryExport) -> None:
    with Pair(export) as pair:
        pair.negotiate()
        other = pair.connect()
        pair.exchange(CLIENT_FLAGS + option(p.NBD_OPT_EXPORT_NAME, b"disk"), other)
        pair.client.send(request(p.NBD_CMD_TRIM, 0, MIB))
        pair.loop.run_once(0)
        assert parse_replies(pair.exchange(request(p.NBD_CMD_FLUSH, 0, 0, cookie=9), other, turns=1)) == [Simple(9, 0)]
        assert any(export.data[-4096:]), "the trim was done in one step"
        assert parse_replies(pair.exchange()) == [Simple(1, 0)]
        other.close()


def test_dirty_bitmap_follows_writes(structured: Pair, export: MemoryExport) -> None:
    structured.exchange(request(p.NBD_CMD_WRITE, 8192, 4096, payload=bytes(4096)))
    number = next(n for n, name in enumerate(export.contexts()) if name == DIRTY)
    replies = parse_replies(structured.exchange(request(p.NBD_CMD_BLOCK_STATUS, 0, 16384)))
    payload = next(r.payload for r in replies if isinstance(r, Chunk) and r.payload[:4] == number.to_bytes(4, "big"))
    assert list(p.EXTENT.iter_unpack(payload[4:])) == [(8192, 0), (4096, 1), (4096, 0)]
