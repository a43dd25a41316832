# SPDX-License-Identifier: Apache-2.0
"""Image sets are there whole or not at all, and their memory is read through any chain of parents."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.errors import BusyError, DamagedError, NotFoundError, StasisError, UnsupportedError
from stasis.process.images import (
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    ImageSet,
    ImageSetWriter,
    MemoryReader,
    Pagemap,
    PagemapWriter,
    encode,
)
from stasis.process.images.schema import InventoryEntry, PagemapEntry, PagemapHead, PstreeEntry
from stasis.process.images.wire import varint
from tests.process.messages import write_set

TASK = PstreeEntry(pid=7, ppid=0, pgid=7, sid=7)


def _memory_set(path: Path, runs: list[tuple[int, int, int]], parent: Path | None = None, fill: bytes = b"x") -> None:
    """A set with memory of task 1: (start page, pages, flags); PRESENT pages are full of `fill`."""
    with ImageSetWriter(path) as out:
        out.write("inventory", InventoryEntry(img_version=2))
        with PagemapWriter(out, 1) as pagemap:
            for start, pages, flags in runs:
                pagemap.add(start * PAGE_SIZE, pages, flags)
                if flags & PE_PRESENT:
                    os.write(pagemap.fd, fill * (pages * PAGE_SIZE))
        if parent is not None:
            out.link_parent(parent)
        out.commit(durable=False)


def _memory(path: Path, size: int = 16) -> bytes:
    """The first byte of each of the first pages of task 1."""
    with ImageSet.open(path) as images:
        chain = images.chain()
        try:
            with MemoryReader(chain, 1) as memory:
                return memory.read(0, size * PAGE_SIZE)[::PAGE_SIZE]
        finally:
            for before in chain[1:]:
                before.close()


def test_a_set_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_set(tmp_path / "set")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "set").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "set").iterdir()} == {0o600}


def test_a_set_that_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        assert not (tmp_path / "set").exists()
    with ImageSetWriter(tmp_path / "set") as out, pytest.raises(ValueError, match="needs an inventory"):
        out.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_gets_the_set_and_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "dump.log").write_text("log")
    write_set(tmp_path)
    assert (tmp_path / "dump.log").read_text() == "log"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(BusyError, match="holds an image set already"):
        ImageSetWriter(tmp_path)
    with ImageSetWriter(tmp_path, replace=True) as out:
        out.write("inventory", InventoryEntry(img_version=2))
        out.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump.log", "inventory.img"]
    (tmp_path / "file").touch()
    with pytest.raises(BusyError, match="is no directory"):
        ImageSetWriter(tmp_path / "file")
    with pytest.raises(NotFoundError, match=r"there is no directory .*/none"):
        ImageSetWriter(tmp_path / "none" / "set")


def test_a_directory_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "file").touch()
        with pytest.raises(BusyError, match="was made by somebody else meanwhile"):
            out.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["file"]


def test_what_is_missing_reads_as_empty(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with ImageSet.open(tmp_path / "set") as images:
        assert images.numbers("core") == [7, 8]
        assert images.messages("tty-info") == []
        assert images.one("fs", 7).umask == 0o22
        assert [entry.pid for entry in images.messages("pstree")] == [7, 8]
        assert ("pages", 1) in images.files()
        assert images.parent() is None
        with pytest.raises(DamagedError, match=r"mm-99\.img is damaged at byte 0: it is missing"):
            images.one("mm", 99)
        with pytest.raises(DamagedError, match=r"pstree\.img is damaged at byte 24: a second record"):
            images.one("pstree")


def test_what_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no image directory"):
        ImageSet.open(tmp_path / "none")
    with pytest.raises(NotFoundError, match=r"there is no inventory\.img"):
        ImageSet.open(tmp_path)
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=3))
        out.commit(durable=False)
    with pytest.raises(UnsupportedError, match="image version 3"):
        ImageSet.open(tmp_path / "set")


def test_no_image_is_read_through_a_link_or_from_a_pipe(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    (tmp_path / "secret").write_bytes(bytes(2 * PAGE_SIZE))
    for name, make in (("pages-1.img", lambda path: path.symlink_to(tmp_path / "secret")),
                       ("core-7.img", os.mkfifo), ("fs-7.img", os.mkdir)):
        (tmp_path / "set" / name).unlink()
        make(tmp_path / "set" / name)
    with ImageSet.open(tmp_path / "set") as images:
        for read in (lambda: images.open_pages(1), lambda: images.one("core", 7), lambda: images.one("fs", 7)):
            with pytest.raises(DamagedError, match="is no regular file"):
                read()


def test_images_can_be_closed_and_go_on(tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        for _ in range(3):
            out.write("pstree", TASK)
        out.image("seccomp").begin()
        out.image("files")
        out.commit(durable=False)
    with ImageSet.open(tmp_path / "set") as images:
        assert images.messages("pstree") == [TASK] * 3
        assert (images.has("seccomp"), images.messages("seccomp"), images.has("files")) == (True, [], False)


def test_both_counts_are_written_and_neighbours_joined(tmp_path: Path) -> None:
    _memory_set(tmp_path / "set", [(1, 1, PE_PRESENT), (2, 2, PE_PRESENT), (4, 1, PE_PARENT), (8, 1, PE_PRESENT)])
    with ImageSet.open(tmp_path / "set") as images:
        head, *entries = images.messages("pagemap", 1)
        assert head == PagemapHead(pages_id=1)
        assert entries[0] == PagemapEntry(vaddr=0x1000, compat_nr_pages=3, flags=PE_PRESENT, nr_pages=3)
        assert len(entries) == 3
        with images.image("pagemap", 1) as image:
            written = (tmp_path / "set" / "pagemap-1.img").read_bytes()
            assert written[8:] == b"".join(len(encode(record.message)).to_bytes(4, "little") + encode(record.message)
                                           for record in image)


def test_a_count_that_does_not_fit_the_old_field_is_in_the_new_one(tmp_path: Path) -> None:
    _memory_set(tmp_path / "set", [(0, 1 << 32, PE_PARENT)])
    with ImageSet.open(tmp_path / "set") as images:
        entry = images.messages("pagemap", 1)[1]
        assert entry == PagemapEntry(vaddr=0, compat_nr_pages=0, flags=PE_PARENT, nr_pages=1 << 32)


@pytest.mark.parametrize(("fields", "size"), [
    ({"compat_nr_pages": 2}, 2), ({"compat_nr_pages": 0, "nr_pages": 2}, 2), ({"compat_nr_pages": 2, "nr_pages": 2}, 2),
    ({"compat_nr_pages": 2, "in_parent": True}, 0), ({"compat_nr_pages": 2, "flags": 0}, 0),
    ({"compat_nr_pages": 2, "flags": PE_PRESENT | PE_LAZY}, 2),
])
def test_page_counts_and_flags_of_all_versions_are_read(tmp_path: Path, fields: Any, size: int) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        out.write("pagemap", PagemapHead(pages_id=3), PagemapEntry(vaddr=0x1000, **fields), number=1)
        out.commit(durable=False)
    with ImageSet.open(tmp_path / "set") as images:
        pagemap = Pagemap.read(images, 1)
        assert pagemap is not None
        assert (pagemap.pages_id, pagemap.present_pages, pagemap[0].end) == (3, size, 0x3000)


@pytest.mark.parametrize(("entries", "reason"), [
    ([(0x1001, 1, 4)], "no range of addresses"), ([(0x1000, 0, 4)], "no range of addresses"),
    ([((1 << 64) - 4096, 2, 4)], "no range of addresses"), ([(0x3000, 1, 4), (0x1000, 1, 4)], "addresses go back"),
    ([(0x1000, 2, 4), (0x2000, 1, 4)], "addresses go back"), ([(0x1000, 1, 5)], "have no meaning"),
    ([(0x1000, 1, 8)], "have no meaning"), ([(0, 1 << 51, 4)], "more pages than a file can hold"),
])
def test_pagemaps_that_make_no_sense(tmp_path: Path, entries: Any, reason: str) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        out.write("pagemap", PagemapHead(pages_id=1), number=1)
        for start, pages, flags in entries:
            out.write("pagemap", PagemapEntry(vaddr=start, compat_nr_pages=0, nr_pages=pages, flags=flags), number=1)
        out.commit(durable=False)
    with ImageSet.open(tmp_path / "set") as images, pytest.raises(DamagedError, match=reason):
        Pagemap.read(images, 1)


def test_compressed_pages_are_refused(tmp_path: Path) -> None:
    entry = PagemapEntry(vaddr=0x1000, compat_nr_pages=1, flags=PE_PRESENT)
    entry.__dict__["_unknown"] = varint(6 << 3) + b"\1"
    with ImageSetWriter(tmp_path / "set") as out:
        out.write("inventory", InventoryEntry(img_version=2))
        out.write("pagemap", PagemapHead(pages_id=1), entry, number=1)
        out.commit(durable=False)
    with ImageSet.open(tmp_path / "set") as images, pytest.raises(UnsupportedError, match="form that is not known"):
        Pagemap.read(images, 1)


def test_pages_and_pagemap_must_agree(tmp_path: Path) -> None:
    with ImageSetWriter(tmp_path / "set") as out:
        with pytest.raises(ValueError, match=r"pages-1\.img has 0 bytes for 1 pages"), PagemapWriter(out, 1) as pagemap:
            pagemap.add(0x1000, 1)
        for number, (start, pages) in enumerate(((0x1000, 1), (0x2001, 1), (0x3000, 0))):
            with PagemapWriter(out, 2 + number) as pagemap:
                pagemap.add(0x1000, 1, PE_PARENT)
                with pytest.raises(ValueError, match="cannot follow"):
                    pagemap.add(start, pages)
    _memory_set(tmp_path / "short", [(1, 2, PE_PRESENT)])
    os.truncate(tmp_path / "short" / "pages-1.img", PAGE_SIZE + 1)
    with pytest.raises(DamagedError, match=r"pages-1\.img is damaged at byte 4097: it ends early: .*needs 2 pages"):
        _memory(tmp_path / "short")
    os.unlink(tmp_path / "short" / "pages-1.img")
    with pytest.raises(DamagedError, match=r"pages-1\.img is damaged at byte 0: it is missing"):
        _memory(tmp_path / "short")


def test_memory_is_read_through_its_parents(tmp_path: Path) -> None:
    _memory_set(tmp_path / "0", [(0, 8, PE_PRESENT)], fill=b"0")
    _memory_set(tmp_path / "1", [(0, 2, PE_PARENT), (2, 2, PE_PRESENT), (4, 4, PE_PARENT)], tmp_path / "0", b"1")
    _memory_set(tmp_path / "2", [(1, 4, PE_PARENT), (5, 1, PE_PRESENT), (6, 2, PE_PARENT)], tmp_path / "1", b"2")
    assert os.readlink(tmp_path / "2" / "parent") == "../1"
    assert _memory(tmp_path / "2", 9) == b"\x000110200\0"


def test_parents_that_lack_pages(tmp_path: Path) -> None:
    _memory_set(tmp_path / "0", [(0, 1, PE_PRESENT), (2, 1, PE_PRESENT)])
    for number, runs in enumerate([(0, 3), (3, 1), (1, 1)]):
        _memory_set(tmp_path / f"child{number}", [(*runs, PE_PARENT)], tmp_path / "0")
        with pytest.raises(DamagedError, match=r"pagemap-1\.img .* left to it by a later dump, is not in it"):
            _memory(tmp_path / f"child{number}")
    _memory_set(tmp_path / "orphan", [(0, 1, PE_PARENT)])
    with pytest.raises(DamagedError, match="the set has none"):
        _memory(tmp_path / "orphan")
    _memory_set(tmp_path / "lazy", [(0, 1, PE_LAZY)])
    with pytest.raises(UnsupportedError, match="page server"):
        _memory(tmp_path / "lazy")


def test_parents_in_a_circle_are_refused(tmp_path: Path) -> None:
    _memory_set(tmp_path / "0", [(0, 1, PE_PARENT)], tmp_path / "1")
    _memory_set(tmp_path / "1", [(0, 1, PE_PARENT)], tmp_path / "0")
    with pytest.raises(DamagedError, match="circle"):
        _memory(tmp_path / "0")


@settings(max_examples=15)
@given(st.lists(st.lists(st.sampled_from([".", "p", "P"]), min_size=12, max_size=12), min_size=1, max_size=6))
def test_chains_of_any_length_are_as_a_model_has_them(
    tmp_path_factory: pytest.TempPathFactory, model: list[list[str]]
) -> None:
    """Each set says of every page: absent, in the parent, or here; what it wants of its parent may be missing."""
    folder = tmp_path_factory.mktemp("chain")
    expected: list[int | None] = [None] * 12
    broken = False
    for number, pages in enumerate(model):
        runs = [(page, 1, PE_PRESENT if kind == "P" else PE_PARENT) for page, kind in enumerate(pages) if kind != "."]
        _memory_set(folder / str(number), runs, folder / str(number - 1) if number else None, bytes([65 + number]))
        wanted = [page for page, kind in enumerate(pages) if kind == "p"]
        expected = [65 + number if kind == "P" else expected[page] if kind == "p" else None
                    for page, kind in enumerate(pages)]
        broken = any(expected[page] is None for page in wanted)
    try:
        read = _memory(folder / str(len(model) - 1), 12)
    except StasisError:
        assert broken
    else:
        assert not broken
        assert list(read) == [value or 0 for value in expected]
