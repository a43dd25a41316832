# SPDX-License-Identifier: Apache-2.0
"""update-img: the index is read right however it is filled, each block is copied or counted, and little is loaded."""

from __future__ import annotations

import _thread
import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from stasis.datto.cowreader import CowReader
from stasis.datto.layout import HEADER_AREA, SECTION_BLOCKS, Geometry
from stasis.datto.opening import create
from stasis.datto.scan import Census, census, runs_of_index
from stasis.datto.update import describe, place_in_series, update
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.bulkread import BulkReader
from stasis.nbd.export import Request
from tests.nbd.exports import MemoryExport
from tests.nbd.wire import ThreadedServer

BLOCK = 4096
SIZE = (64 << 20) + 700
BLOCKS = SIZE // BLOCK + 1
UUID = bytes(range(16))
ENTRIES = st.one_of(st.just(1), st.integers(2, 300), st.integers(2, (1 << 64) - 1), st.sampled_from([256, 1 << 32]))


@given(st.dictionaries(st.integers(0, 10 * SECTION_BLOCKS - 1), ENTRIES, max_size=60), st.booleans())
def test_every_entry_is_found(entries: dict[int, int], marked_only: bool) -> None:
    if marked_only:
        entries = dict.fromkeys(entries, 1)
    geometry = Geometry(10 * SECTION_BLOCKS * BLOCK)
    with tempfile.TemporaryFile() as file:
        file.truncate(geometry.data_offset)
        for block, entry in entries.items():
            os.pwrite(file.fileno(), entry.to_bytes(8, sys.byteorder), HEADER_AREA + block * 8)
        counted = Census()
        runs = [run for runs in runs_of_index(file.fileno(), geometry.sections, counted) for run in runs]
        assert vars_of(counted) == vars_of(census(file.fileno(), geometry))
    assert [block for first, end in runs for block in range(first, end)] == sorted(entries)
    slots = [entry for entry in entries.values() if entry != 1]
    assert vars_of(counted) == (len(entries), len(slots), min(slots, default=0), max(slots, default=0))


def vars_of(counted: Census) -> tuple[int, int, int, int]:
    return counted.changed, counted.pointing, counted.lowest, counted.highest


# -- copying --------------------------------------------------------------------------------------------------


@pytest.fixture
def export() -> MemoryExport:
    export = MemoryExport(SIZE, "datto3", describe(UUID, 8))
    export.data[:] = os.urandom(SIZE)
    return export


@pytest.fixture
def source(export: MemoryExport, short_dir: Path) -> Iterator[BulkReader]:
    with ThreadedServer(short_dir / "s", [export]), BulkReader(str(short_dir / "s"), "datto3", timeout=30) as source:
        yield source


@pytest.fixture
def reader(short_dir: Path) -> Iterator[CowReader]:
    """What changed: single blocks by the hundred, long runs, and the short last block."""
    cow = create(str(short_dir / "cow"), SIZE, uuid=UUID, seqid=7, size=0, cache=1 << 20)
    cow.become_index_only()
    for first, end in [*((block, block + 1) for block in range(10, 3000, 3)), (3000, 7000), (BLOCKS - 2, BLOCKS)]:
        cow.mark(first, end)
    cow.finish()
    cow.close()
    with CowReader(str(short_dir / "cow"), SIZE) as reader:
        yield reader


def _copied(source: BulkReader, reader: CowReader, path: Path) -> tuple[bytes, int, int, list[tuple[int, int]]]:
    path.write_bytes(bytes(SIZE))
    told: list[tuple[int, int]] = []
    with path.open("r+b") as image:
        result = update(source, reader, image.fileno(), lambda done, total: told.append((done, total)))
    return path.read_bytes(), result.changed, result.errors, told


def _expected(export: MemoryExport, reader: CowReader, without: set[int]) -> bytes:
    image = bytearray(SIZE)
    for block in {block for first, end in reader.changed() for block in range(first, end)} - without:
        image[block * BLOCK : (block + 1) * BLOCK] = export.data[block * BLOCK : (block + 1) * BLOCK]
    return bytes(image)


def test_what_changed_is_copied(export: MemoryExport, source: BulkReader, reader: CowReader, short_dir: Path) -> None:
    assert (source.size, place_in_series(source.description)) == (SIZE, (UUID.hex(), 8))
    image, changed, errors, told = _copied(source, reader, short_dir / "image")
    assert image == _expected(export, reader, set())
    assert (changed, errors) == (997 + 4000 + 2, 0)
    assert told == sorted(set(told))
    assert told[-1] == (changed, changed)


def test_a_block_that_cannot_be_read_costs_no_other(
    export: MemoryExport, source: BulkReader, reader: CowReader, short_dir: Path
) -> None:
    broken = {10, 3500, 3501, 6999, BLOCKS - 1}
    export.faults = {block * BLOCK: 5 for block in broken}
    image, changed, errors, _ = _copied(source, reader, short_dir / "image")
    assert image == _expected(export, reader, broken)
    assert (changed, errors) == (997 + 4000 + 2, len(broken))


def test_the_image_is_durable_when_it_is_over(source: BulkReader, reader: CowReader, short_dir: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is busy from early on; what was written after it was told to begin is told to it again."""
    calls: list[str] = []
    real_write, real_sync = os.pwrite, os.fdatasync
    monkeypatch.setattr(os, "pwrite", lambda *given: calls.append("write") or real_write(*given))
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("sync") or real_sync(fd))
    _copied(source, reader, short_dir / "image")
    assert calls[-1] == "sync"
    assert calls.index("sync") < len(calls) - 1 - calls[::-1].index("write")


@pytest.mark.parametrize("failing", [0, 1, -1])
def test_a_disk_that_fails_is_told_of_whenever_it_does(source: BulkReader, reader: CowReader, short_dir: Path,
                                                       monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The kernel tells of a write that failed once, to whoever asks first. -1: no thread could be had to ask early."""
    asked = 0

    def sync(_fd: int) -> None:
        nonlocal asked
        asked += 1
        if asked - 1 == max(failing, 0):
            raise OSError(errno.EIO, "the disk failed")

    def refuse(*_given: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(os, "fdatasync", sync)
    if failing < 0:
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
    with pytest.raises(OSError, match="the disk failed"):
        _copied(source, reader, short_dir / "image")


class _Ends(MemoryExport):
    """Its server's connection ends with the third batch."""

    client: BulkReader | None = None

    def read(self, buffer: IoBuffer, requests: list[Request]) -> None:  # type: ignore[override]
        super().read(buffer, requests)
        if len(self.calls) == 3 and self.client is not None:
            self.client._socket.shutdown(socket.SHUT_RDWR)


def test_what_was_not_copied_when_the_server_went_is_counted(reader: CowReader, short_dir: Path) -> None:
    export = _Ends(SIZE, "datto3")
    export.data[:] = os.urandom(SIZE)
    with ThreadedServer(short_dir / "s", [export]), BulkReader(str(short_dir / "s"), "datto3", timeout=30) as source:
        export.client = source
        image, changed, errors, told = _copied(source, reader, short_dir / "image")
    whole = _expected(export, reader, set())
    same = sum(image[at : at + BLOCK] == whole[at : at + BLOCK] != bytes(BLOCK) for at in range(0, SIZE, BLOCK))
    assert 0 < errors == changed - same
    assert told[-1] == (changed, changed)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGIC" + bytes(10)])
def test_another_kind_of_server_is_an_error(said: bytes, short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "s"))
        listener.listen()

        def serve() -> None:
            connection = listener.accept()[0]
            connection.sendall(said)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConnectionError):
            BulkReader(str(short_dir / "s"), "datto3", timeout=30)
        thread.join()


def test_an_export_that_is_not_there_is_an_error(source: BulkReader, short_dir: Path) -> None:
    with pytest.raises(ConnectionError):
        BulkReader(str(short_dir / "s"), "datto4", timeout=30)


@pytest.mark.parametrize("description", ["", "dattobd snapshot", "dattobd snapshot x of y", "failed dattobd snapshot"])
def test_a_description_that_does_not_tell(description: str) -> None:
    assert place_in_series(description) is None


def test_update_img_loads_next_to_nothing() -> None:
    """Its start is half of what a small update takes."""
    code = ("import sys, stasis.cli.update_img, stasis.datto.update, stasis.datto.cowreader, stasis.nbd.bulkread\n"
            "print(*sys.modules)")
    loaded = subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"], check=True,
                            capture_output=True, text=True).stdout.split()
    assert not {"typing", "re", "enum", "contextlib", "socket", "ctypes", "json", "dataclasses"} & set(loaded)
