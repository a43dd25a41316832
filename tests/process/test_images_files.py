# SPDX-License-Identifier: Apache-2.0
"""Image files byte by byte, and what becomes of files that are cut off, altered or made up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stasis.errors import DamagedError, UnsupportedError
from stasis.process.images import ImageReader, ImageSet, ImageSetWriter, encode
from stasis.process.images import container as container_module
from stasis.process.images.kinds import KINDS, parse_name
from stasis.process.images.magics import MAGICS, NAMES
from stasis.process.images.schema import (
    BpfmapDataEntry,
    GhostChunkEntry,
    GhostFileEntry,
    InventoryEntry,
    IpcMsg,
    IpcMsgEntry,
    IpcSemEntry,
    IpcShmEntry,
    PipeDataEntry,
    PstreeEntry,
    SkPacketEntry,
    StatsEntry,
    TcpStreamEntry,
)
from tests.process.messages import minimal, write_set

TASK = PstreeEntry(pid=7, ppid=0, pgid=7, sid=7, threads=[7])
INVENTORY = "16 31 31 58  04 00 00 00  08 02 10 01"
PSTREE = "19 43 56 54  30 30 27 50  0a 00 00 00  08 07 10 00 18 07 20 07 28 07"


def _write(path: Path, kind: str, message: Any, *payload: Any, number: int | None = None) -> bytes:
    """The bytes of an image of one record, written within a set."""
    with ImageSetWriter(path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        image = out.image(kind, number)
        image.append(message, *payload)
        out.commit(durable=False)
    return (path / "set" / KINDS[kind].file_name(number)).read_bytes()


def _read(path: Path) -> list[Any]:
    """Messages of an image, and the bytes of their parts."""
    with ImageReader.open(str(path)) as image:
        return [(record.message, [(part.message, image.read(part)) for part in record.parts]) for record in image]


def test_the_documented_images_byte_by_byte(tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2, fdinfo_per_id=True))
        out.write("pstree", TASK)
        out.commit(durable=False)
    for name, expected in (("inventory.img", INVENTORY), ("pstree.img", PSTREE)):
        assert (tmp_path / "set" / name).read_bytes() == bytes.fromhex(expected)
    page = (Path(__file__).parents[2] / "docs" / "formats" / "process-images.md").read_text()
    lines = page.split("```")[1].splitlines()
    documented = "".join(line[:25].strip() for line in lines).replace(" ", "")
    assert documented == (INVENTORY + PSTREE).replace(" ", "")


def test_service_files_have_their_own_first_magic(tmp_path: Path) -> None:
    assert _write(tmp_path, "stats-dump", StatsEntry()) == bytes.fromhex("40 59 10 55  06 33 09 57  00 00 00 00")


PIPE = PipeDataEntry(pipe_id=1, bytes=5, size=4096)
CHUNK = GhostChunkEntry(len=3, off=4096)


def _payloads() -> list[tuple[str, int | None, Any, tuple[Any, ...], bytes]]:
    """Kind, number, record, payload as it is given, and all that must follow the record in the file."""
    tcp, sem, shm, queue = minimal(TcpStreamEntry), minimal(IpcSemEntry), minimal(IpcShmEntry), minimal(IpcMsgEntry)
    tcp.inq_len, tcp.outq_len, sem.nsems, shm.size, queue.qnum = 3, 2, 3, 5, 1
    bpf = BpfmapDataEntry(map_id=1, keys_bytes=2, values_bytes=3, count=1)
    ghost, chunked = minimal(GhostFileEntry), minimal(GhostFileEntry)
    chunked.chunks = True
    message = IpcMsg(mtype=1, msize=3)
    return [
        ("pipes-data", None, PIPE, (b"hello",), b"hello"),
        ("fifo-data", None, PIPE, (b"hello",), b"hello"),
        ("sk-queues", None, SkPacketEntry(id_for=1, length=2), (b"hi",), b"hi"),
        ("tcp-stream", 0x1F, tcp, (b"abc", b"de"), b"abcde"),
        ("ipcns-sem", 10, sem, (b"\1\0\2\0\3\0",), b"\1\0\2\0\3\0\0\0"),
        ("ipcns-shm", 10, shm, (b"12345",), b"12345\0\0\0"),
        ("ipcns-msg", 10, queue, ((message, b"abc"),), b"\4\0\0\0\x08\1\x10\3abc\0\0\0\0\0"),
        ("bpfmap-data", None, bpf, (b"kk", b"vvv"), b"kkvvv"),
        ("ghost-file", 0x2A, ghost, (b"all the rest",), b"all the rest"),
        ("ghost-file", 0x2A, chunked, ((CHUNK, b"abc"),), b"\5\0\0\0\x08\3\x10\x80\x20abc"),
    ]


@pytest.mark.parametrize("case", _payloads(), ids=lambda case: case[0])
def test_payloads_lie_behind_their_records(tmp_path: Path, case: Any) -> None:
    kind, number, message, payload, expected = case
    written = _write(tmp_path, kind, message, *payload, number=number)
    encoded = encode(message)
    assert written[8:] == len(encoded).to_bytes(4, "little") + encoded + expected
    name = f"{kind}-{number:x}.img" if kind in ("tcp-stream", "ghost-file") else KINDS[kind].file_name(number)
    ((again, parts),) = _read(tmp_path / "set" / name)
    given = [part if isinstance(part, tuple) else (None, part) for part in payload]
    assert (again, parts) == (message, given)
    for size in range(len(written)):  # cut off anywhere: an error with the place, or what is left is whole
        (tmp_path / "cut.img").write_bytes(written[:size])
        if size in (8, 8 + 4 + len(encoded)) and (size == 8 or kind == "ghost-file"):
            continue
        if kind == "ghost-file" and not message.chunks and size > 8 + 4 + len(encoded):
            continue
        with pytest.raises(DamagedError, match=r"cut\.img is damaged at byte [0-9]+: "):
            _read(tmp_path / "cut.img")


def test_a_payload_of_another_size_is_not_written(tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        for payload in ((b"hell",), (b"hello", b""), ()):
            with pytest.raises(ValueError, match="is announced as"):
                out.image("pipes-data").append(PIPE, *payload)
        with pytest.raises(TypeError, match="pipes-data consists of PipeDataEntry"):
            out.image("pipes-data").append(TASK)
        with pytest.raises(TypeError, match="each part is a IpcMsg"):
            out.image("ipcns-msg", 1).append(minimal(IpcMsgEntry), b"x")


def test_large_payloads_are_copied_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "deleted").write_bytes(b"0123456789")
    reading, writing = os.pipe()
    os.write(writing, b"hello")
    fd = os.open(tmp_path / "deleted", os.O_RDONLY)
    try:
        with ImageSetWriter(tmp_path / "set") as out:
            out.write("inventory", InventoryEntry(img_version=2))
            ghost = out.image("ghost-file", 1)
            ghost.append_head(minimal(GhostFileEntry))
            ghost.copy(fd, 4, offset=2)
            pipe = out.image("pipes-data")
            pipe.append_head(PIPE)
            pipe.copy(reading, 5)
            pipe.append(PIPE, b"again")
            with pytest.raises(OSError, match="ends early"):
                out.image("ghost-file", 2).copy(fd, 4, offset=8)
            out.commit(durable=False)
    finally:
        for end in (reading, writing, fd):
            os.close(end)
    assert _read(tmp_path / "set" / "ghost-file-1.img")[0][1] == [(None, b"2345")]
    assert [parts[0][1] for _, parts in _read(tmp_path / "set" / "pipes-data.img")] == [b"hello", b"again"]


def test_an_image_of_version_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.img").write_bytes(bytes.fromhex(PSTREE)[4:])
    assert _read(tmp_path / "old.img") == [(TASK, [])]


@pytest.mark.parametrize(("content", "reason", "offset"), [
    ("", "ends within its magic", 0),
    ("19 43 56 54 30", "ends within its second magic", 4),
    ("01 02 03 04 05 06 07 08", "0x04030201 begins no image", 0),
    ("19 43 56 54 ff ff ff ff", "0xffffffff begins no image", 4),
    ("19 43 56 54 30 30 27 50 01", "the length of a record", 8),
    ("19 43 56 54 30 30 27 50 ff ff ff ff 08 07", "a record of 4294967295 bytes begins 2 before the end", 8),
    ("19 43 56 54 30 30 27 50 02 00 00 00 08 07", "PstreeEntry lacks its field ppid", 12),
    ("19 43 56 54 30 30 27 50 03 00 00 00 08 07 10", "a number is cut off", 15),
    ("19 43 56 54 09 37 45 56 04 00 00 00 08 01 10 7f 61", "127 bytes should follow and 1 do", 16),
])
def test_damage_is_told_with_file_and_offset(tmp_path: Path, content: str, reason: str, offset: int) -> None:
    (tmp_path / "x.img").write_bytes(bytes.fromhex(content))
    with pytest.raises(DamagedError, match=reason) as caught:
        _read(tmp_path / "x.img")
    assert f"{tmp_path}/x.img is damaged at byte {offset}: " in caught.value.message


def test_holes_cost_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a terabyte that hold next to nothing: one large record, one large payload, endless empty records."""
    large, payload, endless = (tmp_path / name for name in ("large.img", "payload.img", "endless.img"))
    large.write_bytes(bytes.fromhex("19 43 56 54 30 30 27 50 ff ff ff 7f"))
    ghost = encode(minimal(GhostFileEntry))
    payload.write_bytes(bytes.fromhex("19 43 56 54 05 36 58 52") + len(ghost).to_bytes(4, "little") + ghost)
    endless.write_bytes(bytes.fromhex("40 59 10 55 06 33 09 57"))
    for path in (large, payload, endless):
        os.truncate(path, 1 << 40)
    monkeypatch.setattr(container_module, "MAX_RECORDS", 1000)
    for path, reason in ((large, "larger than any"), (payload, "are the limit"), (endless, "more than 1000 records")):
        with pytest.raises(DamagedError, match=reason):
            _read(path)


def _read_all(path: Path, name: str) -> None:
    """Open the set, which reads the inventory, and one image with its payloads."""
    with ImageSet.open(path) as images, images.image(*(parse_name(name) or ("", None))) as image:
        for record in image:
            for part in record.parts:
                image.read(part)


@pytest.mark.parametrize("name", ["inventory", "pstree", "files", "fdinfo-2", "pipes-data", "core-7", "pagemap-7"])
def test_every_cut_and_every_flipped_byte_is_an_error_or_a_set(tmp_path: Path, name: str) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / f"{name}.img"
    whole = path.read_bytes()
    altered = [whole[:size] for size in range(len(whole))]
    altered += [whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1:] for at in range(len(whole))
                for mask in (0x01, 0x80, 0xFF)]
    errors = 0
    for content in altered:
        path.write_bytes(content)
        try:
            _read_all(tmp_path / "set", f"{name}.img")
        except DamagedError as error:
            assert f"{name}.img is damaged at byte " in error.message
            errors += 1
        except UnsupportedError as error:
            assert "has image version" in error.message  # only the inventory has one
            errors += 1
    assert errors > len(whole)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(MAGICS.values())), st.binary(max_size=80))
def test_any_file_is_an_image_or_an_error(tmp_path: Path, magic: int, content: bytes) -> None:
    (tmp_path / "any.img").write_bytes(bytes.fromhex("19 43 56 54") + magic.to_bytes(4, "little") + content)
    try:
        _read(tmp_path / "any.img")
    except DamagedError as error:
        assert "any.img is damaged at byte " in error.message


def test_names_and_numbers_belong_together() -> None:
    for kind in KINDS.values():
        number = 0x1F if kind.number else None
        assert parse_name(kind.file_name(number)) == (kind.name, number)
        assert NAMES[kind.magic] == kind.magic_name
    assert KINDS["tcp-stream"].file_name(0x1F) == "tcp-stream-1f.img"
    assert KINDS["stats-dump"].file_name() == "stats-dump"
    assert parse_name("pages-3.img") == ("pages", 3)
    for name in ("core-07.img", "core-.img", "core.img", "core-7", "core-+7.img", "core-1_0.img", "dump.log", "parent",
                 "tcp-stream-1F.img", "inventory-1.img", "stats-dump.img", "core-99999999999999999999.img"):
        assert parse_name(name) is None, name
    for kind_name, number in (("core", None), ("inventory", 1)):
        with pytest.raises(ValueError, match="number"):
            KINDS[kind_name].file_name(number)
    assert {kind.magic_name for kind in KINDS.values()} == set(MAGICS)
