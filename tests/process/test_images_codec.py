# SPDX-License-Identifier: Apache-2.0
"""Messages survive the way to bytes and back, and bytes that are no message are told with their place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.process.images import FieldError, decode, encode, has
from stasis.process.images import codec as codec_module
from stasis.process.images.message import Message, OpenEnum
from stasis.process.images.schema import (
    CgroupDirEntry,
    FdinfoEntry,
    FdTypes,
    ItimerEntry,
    MmEntry,
    PagemapEntry,
    PstreeEntry,
    RegFileEntry,
    SkOptsEntry,
    StatsEntry,
    VmaEntry,
)
from stasis.process.images.wire import WireError, read_varint, unzigzag, varint, zigzag
from tests.process.messages import CLASSES, messages, minimal


def test_every_message_survives_with_required_fields_alone() -> None:
    assert len(CLASSES) > 110
    for cls in CLASSES:
        message = minimal(cls)
        encoded = encode(message)
        assert decode(cls, encoded) == message, cls
        assert len(encoded) >= 2 * len(cls.required_names), "required fields are written even where they are zero"


@settings(max_examples=60)
@given(st.sampled_from(CLASSES).flatmap(messages))
def test_every_message_survives(message: Any) -> None:
    again = decode(type(message), encode(message))
    assert again == message
    assert encode(again) == encode(message)


@pytest.mark.parametrize(("value", "encoded"), [
    (0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), ((1 << 64) - 1, "ffffffffffffffffff01"),
    (-1, "ffffffffffffffffff01"),
])
def test_varints_are_as_protobuf_documents_them(value: int, encoded: str) -> None:
    assert varint(value).hex() == encoded
    assert read_varint(bytes.fromhex(encoded), 0, len(encoded) // 2) == (value % (1 << 64), len(encoded) // 2)


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_zigzag_is_undone(value: int) -> None:
    assert unzigzag(zigzag(value)) == value
    assert zigzag(value) < 1 << 64


def test_a_mapping_byte_by_byte() -> None:
    mapping = VmaEntry(start=0x1000, end=0x2000, pgoff=0, shmid=0, prot=3, flags=0x22, status=0x201, fd=-1)
    assert encode(mapping).hex(" ", 1) == "08 80 20 10 80 40 18 00 20 00 28 03 30 22 38 81 04 40 01"


def test_the_kinds_of_numbers_byte_by_byte() -> None:
    assert encode(PagemapEntry(vaddr=4096, compat_nr_pages=1, in_parent=True, flags=4, nr_pages=1)).hex(" ", 1) \
        == "08 80 20 10 01 18 01 20 04 28 01"
    options = minimal(SkOptsEntry)
    options.so_filter = [1]
    assert encode(options).endswith(bytes.fromhex("81 01 01 00 00 00 00 00 00 00"))  # fixed64, field 16
    assert encode(RegFileEntry(id=1, flags=0, pos=0, fown=minimal(RegFileEntry).fown, name="x", mnt_id=-1)) \
        .endswith(bytes.fromhex("32 01 78 38 01"))  # sint32 by zigzag


def test_repeated_numbers_are_written_one_by_one_and_read_packed() -> None:
    task = PstreeEntry(pid=1, ppid=0, pgid=1, sid=1, threads=[1, 300])
    assert encode(task).endswith(bytes.fromhex("28 01 28 ac 02"))
    packed = encode(PstreeEntry(pid=1, ppid=0, pgid=1, sid=1)) + bytes.fromhex("2a 03 01 ac 02")
    assert decode(PstreeEntry, packed) == task


def test_presence_is_kept_and_defaults_are_read() -> None:
    without, with_default = minimal(RegFileEntry), minimal(RegFileEntry)
    with_default.mnt_id = -1
    assert (without.mnt_id, has(without, "mnt_id")) == (-1, False)
    again = decode(RegFileEntry, encode(with_default))
    assert (again.mnt_id, has(again, "mnt_id")) == (-1, True)
    assert not has(decode(RegFileEntry, encode(without)), "mnt_id")


def test_unknown_fields_are_kept() -> None:
    strange = bytes.fromhex("f8 06 05  fa 06 02 68 69  fd 06 01 02 03 04  f9 06 01 02 03 04 05 06 07 08")
    encoded = encode(minimal(ItimerEntry))
    message = decode(ItimerEntry, strange + encoded)
    assert encode(message) == encoded + strange
    assert message != minimal(ItimerEntry)


def test_a_name_of_a_later_version_survives_as_its_number() -> None:
    encoded = encode(FdinfoEntry(id=1, flags=0, type=FdTypes(99), fd=3))
    entry = decode(FdinfoEntry, encoded)
    assert (int(entry.type), entry.type.name, encode(entry)) == (99, "99", encoded)
    assert isinstance(entry.type, OpenEnum)


def test_paths_of_any_bytes_survive() -> None:
    entry = minimal(RegFileEntry)
    entry.name = b"/tmp/\xff\xfe".decode("utf-8", "surrogateescape")
    assert b"/tmp/\xff\xfe" in encode(entry)
    assert decode(RegFileEntry, encode(entry)) == entry


def test_a_message_in_two_pieces_is_one() -> None:
    stats = bytes.fromhex("0a 02 08 01")
    with pytest.raises(WireError, match="DumpStatsEntry lacks its field frozen_time"):
        decode(StatsEntry, stats)
    whole = encode(minimal(StatsEntry))
    assert decode(StatsEntry, whole + whole) == minimal(StatsEntry)


@pytest.mark.parametrize(("encoded", "reason", "offset"), [
    ("", "ItimerEntry lacks its field isec", 0),
    ("08", "a number is cut off", 1),
    ("08 80", "a number is cut off", 1),
    ("08 80 80 80 80 80 80 80 80 80 80 01", "more than 64 bits", 1),
    ("08 ff ff ff ff ff ff ff ff ff 02", "more than 64 bits", 1),
    ("0b", "begins no field", 1),
    ("00", "begins no field", 1),
    ("07", "begins no field", 1),
    ("3a 05 00", "5 bytes are announced and 1 are left", 1),
    ("3d 00 00", "cut off", 1),
    ("39 00 00", "cut off", 1),
    ("3a ff ff ff ff ff ff ff ff ff 01", "are announced", 1),
])
def test_bytes_that_are_no_message(encoded: str, reason: str, offset: int) -> None:
    with pytest.raises(WireError, match=reason) as caught:
        decode(ItimerEntry, bytes.fromhex(encoded))
    assert caught.value.offset == offset


@pytest.mark.parametrize(("cls", "field", "value"), [
    (VmaEntry, "prot", 1 << 32), (VmaEntry, "prot", -1), (VmaEntry, "start", 1 << 64), (VmaEntry, "fd", 1 << 63),
    (VmaEntry, "start", "x"), (VmaEntry, "start", 1.5), (RegFileEntry, "name", b"x"), (RegFileEntry, "name", "\ud800"),
    (RegFileEntry, "fown", minimal(VmaEntry)), (MmEntry, "vmas", [None]), (MmEntry, "vmas", 3),
    (RegFileEntry, "ext", 2),
])
def test_values_that_do_not_fit_are_not_written(cls: type[Message], field: str, value: Any) -> None:
    message = minimal(cls)
    setattr(message, field, value)
    with pytest.raises(FieldError, match=rf"{cls.__name__}\.{field}"):
        encode(message)


def test_a_number_that_its_type_cannot_hold_is_damage() -> None:
    encoded = encode(minimal(VmaEntry)) + bytes.fromhex("28 80 80 80 80 10")  # prot = 1 << 32
    with pytest.raises(WireError, match="4294967296 is no uint32"):
        decode(VmaEntry, encoded)


def test_a_required_field_is_asked_for() -> None:
    with pytest.raises(FieldError, match=r"PstreeEntry\.sid is required"):
        encode(PstreeEntry(pid=1, ppid=0, pgid=1))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no field 'uid'"):
        PstreeEntry(pid=1, ppid=0, pgid=1, sid=1, uid=0)  # type: ignore[call-arg]


def test_messages_nested_without_end_are_refused() -> None:
    encoded = b"\x0a\x00"
    for _ in range(200):
        encoded = b"\x0a\x00" + b"\x12" + varint(len(encoded)) + encoded
    with pytest.raises(WireError, match="nested too deep"):
        decode(CgroupDirEntry, encoded)


def test_messages_without_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "MAX_MESSAGES", 10)
    mapping = encode(minimal(VmaEntry))
    one = b"\x72" + varint(len(mapping)) + mapping
    assert len(decode(MmEntry, encode(minimal(MmEntry)) + one * 10).vmas) == 10
    with pytest.raises(WireError, match="too many messages"):
        decode(MmEntry, encode(minimal(MmEntry)) + one * 11)


@settings(max_examples=100)
@given(st.sampled_from(CLASSES), st.binary(max_size=60))
def test_any_bytes_are_a_message_or_an_error(cls: type[Message], data: bytes) -> None:
    try:
        message = decode(cls, data)
    except WireError as error:
        assert 0 <= error.offset <= len(data)
    else:
        assert decode(cls, encode(message)) == message


def test_repr_and_equality_show_what_is_there() -> None:
    assert repr(ItimerEntry(isec=1, iusec=2, vsec=3, vusec=4)) == "ItimerEntry(isec=1, iusec=2, vsec=3, vusec=4)"
    assert ItimerEntry(isec=1, iusec=2, vsec=3, vusec=4) != ItimerEntry(isec=1, iusec=2, vsec=3, vusec=5)
    assert minimal(ItimerEntry) != minimal(VmaEntry)
