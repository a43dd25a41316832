# SPDX-License-Identifier: Apache-2.0
"""Image sets that somebody changed: what a restore reads before it makes anything is fine, or an error of ours."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from stasis.errors import StasisError
from stasis.process.dump.job import dump
from stasis.process.files.opening import FileSet
from stasis.process.files.paths import Paths
from stasis.process.images.imageset import ImageSet
from stasis.process.images.memory import MemoryReader
from stasis.process.images.summary import summarize
from stasis.process.restore.job import restore
from stasis.process.restore.plan import read_tree

LONG = bool(os.environ.get("STASIS_LONG"))

pytestmark = [pytest.mark.root, pytest.mark.timeout(7200 if LONG else 300)]

MUTATIONS = 20_000 if LONG else 300
RESTORES = 500 if LONG else 8


def _dumped(directory: Path) -> tuple[int, Path]:
    nothing = subprocess.DEVNULL
    with subprocess.Popen(["sleep", "1000"], start_new_session=True, stdin=nothing, stdout=nothing,
                          stderr=nothing) as process:  # fmt: skip
        dump(process.pid, directory / "golden")
    return process.pid, directory / "golden"


def _changed(draw: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes put in or left out, the end cut off, a length made huge."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(changed)) if changed else 0
        kind = draw.randrange(5)
        if kind == 0 and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 2:
            del changed[at : at + draw.randrange(1, 9)]
        elif kind == 3:
            del changed[at:]
        else:
            changed[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(changed)


def _mutate(draw: random.Random, golden: Path, place: Path) -> str:
    """A copy of the set with one file changed; its name."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(golden, place)
    name = draw.choice(sorted(each.name for each in golden.iterdir() if not each.name.startswith("pages-")))
    (place / name).write_bytes(_changed(draw, (golden / name).read_bytes()))
    return name


def _read_all(path: Path) -> None:
    """As a restore does, and `stasis process show`."""
    with ImageSet.open(path) as images:
        summarize(images)
        root = read_tree(images)
        files = FileSet(images, Paths(images, str, str))
        for plan in root.walk():
            if plan.ids is not None:
                files.check(plan.ids.files_id)
            if plan.mm is not None:
                with MemoryReader([images], plan.pid) as memory:
                    for vma in plan.mm.vmas:
                        list(memory.sources(vma.start, vma.end))


def test_a_changed_set_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    _, golden = _dumped(tmp_path)
    _read_all(golden)
    refused = 0
    for number in range(MUTATIONS):
        name = _mutate(draw, golden, tmp_path / "changed")
        try:
            _read_all(tmp_path / "changed")
        except StasisError as error:
            refused += 1
            assert str(error), f"mutation {number} of {name}"
    assert refused > MUTATIONS // 4


def test_a_changed_set_is_restored_or_leaves_nothing(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    pid, golden = _dumped(tmp_path)
    for _ in range(RESTORES):
        _mutate(draw, golden, tmp_path / "changed")
        try:
            restored = restore(tmp_path / "changed").pid
        except StasisError:
            assert not os.path.exists(f"/proc/{pid}")
            continue
        os.kill(restored, 9)
        os.waitpid(restored, 0)
