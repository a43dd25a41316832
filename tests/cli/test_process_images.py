# SPDX-License-Identifier: Apache-2.0
"""`stasis process show`, `decode` and `encode` as a user calls them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.process.messages import write_set
from tests.runner import Stasis


@pytest.fixture
def images(short_dir: Path) -> Path:
    write_set(short_dir / "images")
    return short_dir / "images"


def test_show_prints_the_tree_with_its_memory_and_files(stasis: Stasis, images: Path) -> None:
    lines = stasis("process", "show", images, "--files", "--memory").splitlines()
    assert f"images         {images}" in lines
    assert "tasks          2, with 3 threads" in lines
    assert "memory         16 KiB" in lines
    tree = [line.split() for line in lines if "task7" in line or "  task8" in line]
    assert tree[0] == ["7", "0", "alive", "2", "0", "24", "KiB", "8", "KiB", "2", "task7"]
    assert any(line.endswith("  task8") for line in lines), "children are indented"
    assert "0   file           1   /bin/x, read and write at 5" in lines
    assert "3   pipe  cloexec  2   pipe 77, write end" in lines
    assert "10000-12000  rw-p    8 KiB   4 KiB  [heap]" in lines


def test_show_as_json_has_the_documented_fields(stasis: Stasis, images: Path) -> None:
    shown = stasis.json("process", "show", images)
    assert {"path", "version", "continues_parent", "kept", "shared", "tasks"} == set(shown)
    task = shown["tasks"][0]
    assert (task["pid"], task["exe"], task["cwd"], task["kept"], task["in_parent"]) == (7, "/bin/x", "/bin/x", 8192, 0)
    assert [entry["kind"] for entry in task["descriptors"]] == ["file", "pipe"]


def test_a_predump_and_a_set_that_lacks_files_can_be_shown(stasis: Stasis, images: Path) -> None:
    for name in ("mm-7.img", "fs-7.img", "core-8.img", "ids-8.img", "files.img"):
        (images / name).unlink()
    assert "task7" in stasis("process", "show", images, "--files", "--memory")
    (images / "pstree.img").unlink()
    assert stasis.json("process", "show", images)["tasks"] == []


def test_names_that_are_no_text_reach_no_terminal(stasis: Stasis, images: Path) -> None:
    document = json.loads(stasis("process", "decode", images / "files.img"))
    document["entries"][0]["reg"]["name"] = "/bin/\x1b[2J\udcff"
    path = images.parent / "document"
    path.write_text(json.dumps(document))
    stasis("process", "encode", path, "--output", images / "files.img")
    assert b"/bin/\x1b[2J\xff" in (images / "files.img").read_bytes()
    assert r"/bin/\x1b[2J\xff, read and write at 5" in stasis("process", "show", images, "--files")
    assert stasis.json("process", "show", images)["tasks"][0]["exe"] == "/bin/\x1b[2J\udcff"


def test_decode_and_encode_are_inverse(stasis: Stasis, images: Path, short_dir: Path) -> None:
    printed = stasis("process", "decode", images / "pipes-data.img")
    assert json.loads(printed) == {
        "magic": "PIPES_DATA", "entries": [{"pipe_id": 77, "bytes": 5, "size": 65536, "extra": "aGVsbG8=\n"}]}
    stasis("process", "decode", images / "pipes-data.img", "--pretty", "--output", short_dir / "document")
    stasis("process", "encode", short_dir / "document", "--output", short_dir / "again.img")
    assert (short_dir / "again.img").read_bytes() == (images / "pipes-data.img").read_bytes()
    piped = subprocess.run([*stasis.command, "process", "encode", "-"], input=printed.encode(), capture_output=True,
                           env=stasis.environment)
    assert piped.stdout == (images / "pipes-data.img").read_bytes()


def test_a_damaged_image_is_told_and_replaces_nothing(stasis: Stasis, images: Path, short_dir: Path) -> None:
    path = images / "pstree.img"
    path.write_bytes(path.read_bytes()[:-1])
    (short_dir / "document").write_text("old")
    error = stasis.fail(ExitCode.DAMAGED, "process", "decode", path, "--output", short_dir / "document")
    assert "pstree.img is damaged at byte 24: a record of 10 bytes begins 9 before the end" in error
    assert (short_dir / "document").read_text() == "old"
    assert "pstree.img is damaged at byte" in stasis.fail(ExitCode.DAMAGED, "process", "show", images)
    assert not [entry for entry in short_dir.iterdir() if entry.name.startswith(".stasis-")]


@pytest.mark.parametrize(("arguments", "code", "reason"), [
    (["show", "none"], ExitCode.NOT_FOUND, "none is no image directory"),
    (["show", "."], ExitCode.NOT_FOUND, "there is no inventory.img"),
    (["decode", "none"], ExitCode.NOT_FOUND, "none does not exist"),
    (["encode", "none"], ExitCode.NOT_FOUND, "none does not exist"),
    (["decode", "images/pages-1.img"], ExitCode.DAMAGED, "begins no image that is known"),
    (["encode", "images/pages-1.img"], ExitCode.USAGE, "is no JSON"),
])
def test_wrong_input(stasis: Stasis, images: Path, arguments: list[str], code: ExitCode, reason: str,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    assert reason in stasis.fail(code, "process", *arguments)
