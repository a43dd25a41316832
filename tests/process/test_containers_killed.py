# SPDX-License-Identifier: Apache-2.0
"""A container whose dumper or restorer is killed at any moment: it goes on, or nothing of it is there."""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path

import pytest

from stasis.linux import procfs
from stasis.linux.mountinfo import mount_table
from tests.process.containers import PLACES, Container, container, setup_script
from tests.process.programs import compiled, stasis, wait_for
from tests.process.victims import killed_while

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), pytest.mark.tool("unshare")]

KILLS = 40 if os.environ.get("STASIS_LONG") else 2
LONGEST = 1.2
COUNTING = r"""
// Two processes that count in shared memory of a file.
int main(void) {
    int file = open("counts", O_RDWR | O_CREAT, 0600);
    CHECK(!ftruncate(file, 4096));
    volatile long *counts = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (!fork()) while (1) { counts[1]++; usleep(2000); }
    touch("ready");
    while (access("go", F_OK)) { counts[0]++; usleep(2000); }
    return content();
}
"""


def _alone(directory: Path) -> Path:
    compiled(directory, COUNTING)
    return setup_script(directory)


def _counts(directory: Path) -> tuple[int, ...]:
    data = (directory / "counts").read_bytes()
    return tuple(int.from_bytes(data[at : at + 8], "little") for at in (0, 8))


def _goes_on(directory: Path) -> None:
    before = _counts(directory)
    for place in range(2):
        wait_for(lambda place=place: _counts(directory)[place] > before[place], "it stands still")  # type: ignore[misc]


def _inside(directory: Path) -> list[int]:
    """The processes that have the file mapped: those of the container, and of one that is being made."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if f"{directory}/counts" in procfs.read(int(name), "maps").decode(errors="replace"):
                    found.append(int(name))
            except OSError:
                continue
    return found


def _settled(program: Container, before: tuple[int, ...]) -> bool:
    """Nothing is there, or everything is and runs without us."""
    there = _inside(program.directory)
    return not there or (len(there) == 2 and _is_free(program) and _counts(program.directory) > before)


def _is_free(program: Container) -> bool:
    try:
        return all(procfs.status(pid)["TracerPid"] == "0" for pid in _inside(program.directory))
    except ProcessLookupError:
        return False


def _mounts() -> list[str]:
    return [mount.target for mount in mount_table() if not mount.target.startswith(PLACES)]


def test_a_dumper_that_is_killed_leaves_the_container(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with container(tmp_path, "-pmiun", "--mount-proc", "sh", _alone(tmp_path)) as program:
        for number in range(KILLS):
            killed_while(draw, LONGEST, "dump", program.pid, "--images", tmp_path / f"set-{number}", "--leave-running")
            wait_for(lambda: _is_free(program), "a process is traced still")
            _goes_on(tmp_path)
            wait_for(lambda: not list(tmp_path.glob(".stasis-images-*")), "something is left of the images")
        program.restore(program.dump())
        _goes_on(tmp_path)
        program.finish()


def test_a_restorer_that_is_killed_leaves_all_or_nothing(tmp_path: Path, seed: int) -> None:
    draw, mounts = random.Random(seed), _mounts()
    with container(tmp_path, "-pmiun", "--mount-proc", "sh", _alone(tmp_path)) as program:
        images = program.dump()
        for _ in range(KILLS):
            before = _counts(tmp_path)
            killed_while(draw, LONGEST, "restore", "--images", images)
            wait_for(partial(_settled, program, before), "half of it is left")
            if there := _inside(tmp_path):  # it was through
                program.pid = min(there, key=lambda pid: int(procfs.status(pid)["NSpid"].split()[-1]))
                _goes_on(tmp_path)
                images = program.dump()
        assert _mounts() == mounts
        program.restore(images)
        _goes_on(tmp_path)
        program.finish()


def test_a_container_is_left_stopped(tmp_path: Path) -> None:
    with container(tmp_path, "-p", compiled(tmp_path, COUNTING)) as program:
        program.dump("--leave-running")
        stasis("dump", program.pid, "--images", tmp_path / "stopped", "--leave-stopped")
        wait_for(lambda: all(procfs.stat(pid).state == "T" for pid in _inside(tmp_path)), "it is not stopped")
        for pid in _inside(tmp_path):
            os.kill(pid, 18)
        _goes_on(tmp_path)
        program.finish()
