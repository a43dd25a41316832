# SPDX-License-Identifier: Apache-2.0
"""A tree comes back below another root directory, or stopped; and how far it is can be seen."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.linux import procfs
from tests.process.programs import compiled, running, wait_for
from tests.process.victims import victim

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

LOOKING = r"""
static char filled[4 << 20];
int main(void) {
    int file = open("counted", O_RDWR | O_CREAT, 0600);
    CHECK(write(file, "one", 3) == 3);
    memset(filled, 7, sizeof filled);
    set_up();
    char found[8] = "";
    CHECK(write(file, "two", 3) == 3 && filled[3 << 20] == 7);
    CHECK(!access("/only-there", F_OK) && access("/usr/bin/env", F_OK) < 0);
    CHECK(pread(open("counted", O_RDONLY), found, 7, 0) == 6 && !strcmp(found, "onetwo"));
    return content();
}
"""


def _other_root(directory: Path) -> Path:
    """A directory that has what the program had open, and nothing of this machine."""
    root = directory / "root"
    work = Path(f"{root}{directory}")
    work.mkdir(parents=True)
    for name in ("program", "counted", "errors"):
        shutil.copy(directory / name, work / name)
    (root / "dev").mkdir()
    os.mknod(root / "dev" / "null", 0o20666, os.makedev(1, 3))
    (root / "only-there").touch()
    return root


@pytest.mark.parametrize("option", ["--root={}", "--map-path=/={}"])
def test_another_root(tmp_path: Path, option: str) -> None:
    with running(tmp_path, compiled(tmp_path, LOOKING, "-static")) as program:
        images = program.dump()
        root = _other_root(tmp_path)
        program.restore(images, option.format(root))
        work = Path(f"{root}{tmp_path}")
        try:
            assert Path(f"/proc/{program.pid}/root").readlink() == root
            assert Path(f"/proc/{program.pid}/exe").readlink() == work / "program"
        finally:
            (work / "go").touch()
        wait_for((work / "content").exists, (work / "errors").read_text() or "it does not go on")
        assert (tmp_path / "counted").read_bytes() == b"one"


def test_stopped(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, LOOKING)) as program:
        program.restore(program.dump(), "--leave-stopped")
        wait_for(lambda: procfs.stat(program.pid).state == "T", "it runs")
        os.kill(program.pid, signal.SIGCONT)
        wait_for(lambda: procfs.stat(program.pid).state == "S", "it does not go on")


SIZE = 8 << 20
FULL = f"import os, mmap; here = mmap.mmap(-1, {SIZE}, mmap.MAP_PRIVATE); here[:] = os.urandom({SIZE}); "
TOLD = """
import sys
from stasis.process import meter
from stasis.process.{0}.job import {1}Options, {0}
meter.INTERVAL = 0
{0}(*(int(word) if word.isdecimal() else word for word in sys.argv[1:]), {1}Options(progress=print))
"""


def _told(module: str, options: str, *words: str | Path | int) -> list[tuple[int, int]]:
    """What the progress of a dump or restore was, in a process with one thread."""
    code = TOLD.format(module, options)
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True,
                          timeout=60)  # fmt: skip
    return [(int(part), int(whole)) for part, whole in map(str.split, done.stdout.splitlines())]


def _check(told: list[tuple[int, int]]) -> None:
    """What is done grows up to about what there is."""
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] >= SIZE
    assert all(total >= SIZE for total in totals)
    assert done[-1] > 0.5 * totals[-1]


def test_how_far_it_is(tmp_path: Path) -> None:
    with victim(sys.executable, "-c", f"{FULL}print('ready', flush=True); input()") as process:
        _check(_told("dump", "Dump", process.pid, tmp_path / "images"))
        process.wait(60)
        try:
            _check(_told("restore", "Restore", tmp_path / "images"))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


SHOWING = """
from stasis.cli import memory_progress
memory_progress.PATIENCE = 0
with memory_progress.memory_progress("copied", as_json=False) as show:
    show(1 << 20, 4 << 20)
"""


def test_a_line_on_a_terminal() -> None:
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", SHOWING], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert "copied 1 MiB of 4 MiB (25 %)" in shown
    assert shown.endswith("\r\x1b[K")
