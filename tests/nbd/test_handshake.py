# SPDX-License-Identifier: Apache-2.0
"""Every message of the negotiation, as the bytes that travel."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.nbd import protocol as p
from stasis.nbd.export import ExportList
from stasis.nbd.handshake import Handshake, HandshakeError, State
from tests.nbd.exports import DIRTY, MemoryExport
from tests.nbd.wire import CLIENT_FLAGS, contexts, go, option, option_replies, text

ACK = p.NBD_REP_ACK


def started(*exports: MemoryExport, tls: bool = False) -> Handshake:
    handshake = Handshake(ExportList(*(exports or (MemoryExport(),))), tls_available=tls)
    assert handshake.feed(CLIENT_FLAGS) == b""
    return handshake


def answer(handshake: Handshake, data: bytes) -> list[tuple[int, int, bytes]]:
    return option_replies(handshake.feed(data))


def test_greeting() -> None:
    greeting = Handshake(ExportList()).greeting
    assert greeting == b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"


def test_go_golden_bytes() -> None:
    handshake = started()
    reply = handshake.feed(b"IHAVEOPT" + bytes.fromhex("00000007 0000000a 00000004") + b"disk" + b"\x00\x00")
    head = bytes.fromhex("0003e889045565a9 00000007")
    export = bytes.fromhex("00000003 0000000c 0000 0000000000100000 0d6d")
    sizes = bytes.fromhex("00000003 0000000e 0003 00000001 00001000 02000000")
    assert reply == head + export + head + sizes + head + bytes.fromhex("00000001 00000000")
    assert handshake.state is State.DONE
    assert handshake.session is not None
    assert not handshake.session.structured


def test_export_name_golden_bytes_with_and_without_zeroes() -> None:
    message = option(p.NBD_OPT_EXPORT_NAME, b"disk")
    assert started().feed(message) == bytes.fromhex("0000000000100000 0d6d")
    old = Handshake(ExportList(MemoryExport()))
    old.feed(p.CLIENT_FLAGS.pack(p.NBD_FLAG_C_FIXED_NEWSTYLE))
    assert old.feed(message) == bytes.fromhex("0000000000100000 0d6d") + bytes(124)


def test_name_and_description_are_told_when_asked() -> None:
    replies = answer(started(), go("disk", p.NBD_INFO_NAME, p.NBD_INFO_DESCRIPTION, 99, number=p.NBD_OPT_INFO))
    assert (6, p.NBD_REP_INFO, b"\x00\x01disk") in replies
    assert (6, p.NBD_REP_INFO, b"\x00\x02a test disk") in replies
    assert replies[-1] == (6, ACK, b"")


def test_info_does_not_end_the_negotiation() -> None:
    handshake = started()
    answer(handshake, go("disk", number=p.NBD_OPT_INFO))
    assert handshake.state is State.OPTIONS


def test_list_names_all_exports() -> None:
    replies = answer(started(MemoryExport(name="a"), MemoryExport(name="b")), option(p.NBD_OPT_LIST))
    assert replies == [(3, p.NBD_REP_SERVER, text("a")), (3, p.NBD_REP_SERVER, text("b")), (3, ACK, b"")]


def test_empty_name_is_the_only_export() -> None:
    assert answer(started(), go(""))[-1][1] == ACK
    two = started(MemoryExport(name="a"), MemoryExport(name="b"))
    assert answer(two, go(""))[-1][1] == p.NBD_REP_ERR_UNKNOWN


def test_abort() -> None:
    handshake = started()
    assert answer(handshake, option(p.NBD_OPT_ABORT)) == [(2, ACK, b"")]
    assert handshake.state is State.ABORTED


def test_contexts_are_listed_by_wildcards() -> None:
    handshake = started()
    answer(handshake, option(p.NBD_OPT_STRUCTURED_REPLY))

    def listed(*queries: str) -> list[str]:
        replies = answer(handshake, contexts("disk", *queries, number=p.NBD_OPT_LIST_META_CONTEXT))
        assert replies[-1][1] == ACK
        assert all(data[:4] == bytes(4) for _, _, data in replies[:-1])
        return [data[4:].decode() for _, _, data in replies[:-1]]

    everything = [p.BASE_ALLOCATION, DIRTY, p.QEMU_ALLOCATION_DEPTH]
    assert listed() == everything
    assert listed("base:") == [p.BASE_ALLOCATION]
    assert listed("qemu:") == [DIRTY, p.QEMU_ALLOCATION_DEPTH]
    assert listed("qemu:dirty-bitmap:") == [DIRTY]
    assert listed(DIRTY, "x:unknown") == [DIRTY]
    assert listed("x:") == []


def test_set_selects_exact_names_only_and_replaces() -> None:
    handshake = started()
    answer(handshake, option(p.NBD_OPT_STRUCTURED_REPLY))
    assert answer(handshake, contexts("disk", "base:", "qemu:")) == [(10, ACK, b"")]
    first = answer(handshake, contexts("disk", p.BASE_ALLOCATION, DIRTY, "other:thing"))
    assert [data[4:] for _, _, data in first[:-1]] == [b"base:allocation", DIRTY.encode()]
    assert len({data[:4] for _, _, data in first[:-1]}) == 2
    second = answer(handshake, contexts("disk", p.QEMU_ALLOCATION_DEPTH))
    number = struct.unpack(">I", second[0][2][:4])[0]
    answer(handshake, go("disk"))
    assert handshake.session is not None
    assert handshake.session.contexts == {number: p.QEMU_ALLOCATION_DEPTH}


def test_contexts_of_another_export_do_not_count() -> None:
    handshake = started(MemoryExport(name="a"), MemoryExport(name="b"))
    answer(handshake, option(p.NBD_OPT_STRUCTURED_REPLY) + contexts("a", p.BASE_ALLOCATION) + go("b"))
    assert handshake.session is not None
    assert handshake.session.contexts == {}


def test_a_set_that_fails_leaves_nothing_selected() -> None:
    handshake = started()
    good, bad = contexts("disk", p.BASE_ALLOCATION), contexts("nothing", p.BASE_ALLOCATION)
    answer(handshake, option(p.NBD_OPT_STRUCTURED_REPLY) + good + bad + go("disk"))
    assert handshake.session is not None
    assert handshake.session.contexts == {}


def test_df_is_advertised_with_structured_replies_only() -> None:
    plain, structured = started(), started()
    answer(structured, option(p.NBD_OPT_STRUCTURED_REPLY))
    flags = [p.INFO_EXPORT.unpack(answer(handshake, go("disk"))[0][2])[2] for handshake in (plain, structured)]
    assert not flags[0] & p.NBD_FLAG_SEND_DF
    assert flags[1] & p.NBD_FLAG_SEND_DF


def test_read_only_export_offers_no_modification() -> None:
    export = MemoryExport()
    export.read_only = True
    flags = p.INFO_EXPORT.unpack(answer(started(export), go("disk"))[0][2])[2]
    assert flags & p.NBD_FLAG_READ_ONLY
    assert not flags & (p.NBD_FLAG_SEND_TRIM | p.NBD_FLAG_SEND_WRITE_ZEROES | p.NBD_FLAG_SEND_FAST_ZERO)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (option(11), p.NBD_REP_ERR_UNSUP),  # NBD_OPT_EXTENDED_HEADERS
        (option(4), p.NBD_REP_ERR_UNSUP),  # the withdrawn NBD_OPT_PEEK_EXPORT
        (option(12345, b"data"), p.NBD_REP_ERR_UNSUP),
        (option(p.NBD_OPT_LIST, b"x"), p.NBD_REP_ERR_INVALID),
        (option(p.NBD_OPT_STRUCTURED_REPLY, b"x"), p.NBD_REP_ERR_INVALID),
        (option(p.NBD_OPT_STARTTLS), p.NBD_REP_ERR_POLICY),
        (option(p.NBD_OPT_STARTTLS, b"x"), p.NBD_REP_ERR_INVALID),
        (go("nothing"), p.NBD_REP_ERR_UNKNOWN),
        (go("x" * 4097), p.NBD_REP_ERR_TOO_BIG),
        (option(p.NBD_OPT_GO), p.NBD_REP_ERR_INVALID),
        (option(p.NBD_OPT_GO, text("disk")), p.NBD_REP_ERR_INVALID),
        (option(p.NBD_OPT_GO, text("disk") + b"\x00\x02\x00\x00"), p.NBD_REP_ERR_INVALID),
        (option(p.NBD_OPT_GO, text("disk") + b"\x00\x00\x00"), p.NBD_REP_ERR_INVALID),
        (option(p.NBD_OPT_GO, b"\x00\x00\x00\x02\xff\xfe\x00\x00"), p.NBD_REP_ERR_INVALID),
        (contexts("disk", p.BASE_ALLOCATION), p.NBD_REP_ERR_INVALID),  # before structured replies
        (option(p.NBD_OPT_INFO, bytes(70_000)), p.NBD_REP_ERR_TOO_BIG),
    ],
)
def test_errors_are_answered_and_negotiation_goes_on(message: bytes, error: int) -> None:
    handshake = started()
    replies = answer(handshake, message)
    assert [kind for _, kind, _ in replies] == [error]
    assert answer(handshake, go("disk"))[-1][1] == ACK


@pytest.mark.parametrize(
    "message",
    [
        b"IHAVEOPS" + bytes(8),
        p.OPTION.pack(p.NBD_OPTION_MAGIC, p.NBD_OPT_GO, 0xFFFFFFFF),
        option(p.NBD_OPT_EXPORT_NAME, b"nothing"),
        option(p.NBD_OPT_EXPORT_NAME, b"\xff"),
        option(p.NBD_OPT_EXPORT_NAME, bytes(70_000)),
    ],
)
def test_what_has_no_reply_drops_the_client(message: bytes) -> None:
    with pytest.raises(HandshakeError):
        started().feed(message)


@pytest.mark.parametrize("flags", [0, p.NBD_FLAG_C_NO_ZEROES, 7, 0x80000001])
def test_client_flags_that_are_unknown_or_too_old_drop_the_client(flags: int) -> None:
    with pytest.raises(HandshakeError):
        Handshake(ExportList()).feed(p.CLIENT_FLAGS.pack(flags))


def test_with_tls_everything_else_is_refused_before_it() -> None:
    for message in (option(p.NBD_OPT_LIST), go("disk"), option(p.NBD_OPT_STRUCTURED_REPLY), option(11)):
        assert answer(started(tls=True), message)[0][1] == p.NBD_REP_ERR_TLS_REQD
    with pytest.raises(HandshakeError):
        started(tls=True).feed(option(p.NBD_OPT_EXPORT_NAME, b"disk"))
    assert answer(started(tls=True), option(p.NBD_OPT_ABORT))[0][1] == ACK


def test_starttls_forgets_what_was_negotiated_before() -> None:
    handshake = started(tls=True)
    assert answer(handshake, option(p.NBD_OPT_STARTTLS)) == [(5, ACK, b"")]
    assert handshake.state is State.STARTTLS
    handshake.tls_started()
    assert answer(handshake, option(p.NBD_OPT_STARTTLS))[0][1] == p.NBD_REP_ERR_INVALID
    assert answer(handshake, go("disk"))[-1][1] == ACK


def test_plaintext_behind_starttls_drops_the_client() -> None:
    with pytest.raises(HandshakeError):
        started(tls=True).feed(option(p.NBD_OPT_STARTTLS) + option(p.NBD_OPT_LIST))


@given(st.data())
def test_any_way_of_cutting_the_stream_gives_the_same_answers(data: st.DataObject) -> None:
    stream = (
        CLIENT_FLAGS
        + option(p.NBD_OPT_STRUCTURED_REPLY)
        + option(77, bytes(100))
        + contexts("disk", DIRTY)
        + go("disk", p.NBD_INFO_NAME)
        + b"requests"
    )
    whole, cut = Handshake(ExportList(MemoryExport())), Handshake(ExportList(MemoryExport()))
    expected = whole.feed(stream)
    replies = b""
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        replies += cut.feed(stream[:size])
        stream = stream[size:]
    assert replies == expected
    assert cut.leftover == whole.leftover == b"requests"
    assert cut.session is not None
    assert list(cut.session.contexts.values()) == [DIRTY]
