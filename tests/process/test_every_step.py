# SPDX-License-Identifier: Apache-2.0
"""Whatever step a dump or a restore is killed at: every task goes on as it was, or nothing is left behind."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from stasis.linux import procfs
from stasis.process.dump.canary import is_canary
from stasis.process.dump.job import DumpOptions, dump
from stasis.process.dump.predump import pre_dump
from stasis.process.restore.job import restore
from tests.process.injector import count_steps, kill_at
from tests.process.programs import Program, compiled, counts, goes_on, running, wait_for
from tests.process.test_killed import FAMILY, settled

LONG = bool(os.environ.get("STASIS_LONG"))

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), *([pytest.mark.timeout(7200)] if LONG else [])]

SAMPLE = 6
LAST = 120
"""Steps in which a dump puts its set in its place and ends the tree."""


def steps(total: int, seed: int) -> Iterator[int]:
    """All of them, or a sample from each part."""
    if LONG:
        yield from range(1, total + 1)
        return
    draw = random.Random(seed)
    for part in range(SAMPLE):
        yield draw.randrange(total * part // SAMPLE, total * (part + 1) // SAMPLE) + 1


def _state(pids: list[int]) -> list[object]:
    """What a dump must not change. Where soft-dirty bits are the marks, a keeper has two pages in each process."""
    found: list[object] = []
    for pid in pids:
        found.append(sorted(os.listdir(f"/proc/{pid}/fd")))
        found.append([(mapping.start, mapping.end, mapping.permissions, mapping.path)
                      for mapping in procfs.mappings(pid, flags=False) if not is_canary(mapping)])  # fmt: skip
        for tid in procfs.threads(pid):
            status = procfs.status(pid, tid)
            found.append([status[name] for name in ("TracerPid", "SigBlk", "SigIgn", "SigCgt", "State")][:4])
    return found


def killed_again_and_again(program: Program, seed: int, work: Callable[[Path], object]) -> None:
    """Kill the work at each step, in a directory of its own each time."""
    goes_on(program)  # all threads are there
    pids = program.descendants()
    before = _state(pids)
    total = count_steps(lambda: work(program.directory / "counted"))
    for step in steps(total, seed):
        place = program.directory / f"step-{step}"
        place.mkdir()
        kill_at(step, lambda place=place: work(place / "images"))
        assert _state(pids) == before, f"killed at step {step} of {total}"
        left = os.listdir(place)
        assert left in ([], ["images"]), f"killed at step {step} of {total}: {left}"
        shutil.rmtree(place)
        goes_on(program)


def test_a_dumper_that_is_killed_at_any_step(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        options = DumpOptions(leave_running=True)
        killed_again_and_again(program, seed, lambda images: dump(program.pid, images, options))
        (tmp_path / "go").touch()
        program.finish()


def test_a_dumper_that_is_killed_while_it_ends_the_tree(tmp_path: Path, seed: int) -> None:
    """Its last steps: all of the tree go on, or all have ended and the set is whole."""
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        program.pids = program.descendants()
        images = tmp_path / "counted"
        total = count_steps(lambda: dump(program.pid, images))
        program.process.wait()
        last = range(total - LAST, total)
        for step in last if LONG else random.Random(seed).sample(last, SAMPLE):
            wait_for(lambda: not any(map(_is_there, program.pids)), "nobody waits for the dead")
            program.restore(images)
            images = tmp_path / f"step-{step}"
            kill_at(step, lambda images=images: dump(program.pid, images))
            wait_for(lambda: not any(map(_is_dead, program.pids)), "nobody waits for the dead")
            there = list(filter(_is_there, program.pids))
            assert there == program.pids or (not there and images.exists()), f"killed at step {step} of {total}"
            if there:
                goes_on(program)
                images = program.dump()
        program.restore(images)
        program.finish()


def test_a_pre_dump_that_is_killed_at_any_step(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        killed_again_and_again(program, seed, lambda images: pre_dump(program.pid, images))
        program.finish()


def test_a_restorer_that_is_killed_at_any_step(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        images = program.dump()
        total = count_steps(lambda: restore(images))
        for step in steps(total, seed):
            images = end(program, images)
            kill_at(step, lambda images=images: restore(images))
            before = counts(tmp_path)  # who was killed with the restorer may take a moment longer, but counts no more
            wait_for(partial(settled, program, before), f"killed at step {step} of {total}: half of the tree is left")
        program.restore(end(program, images))
        goes_on(program)
        program.finish()


def _is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def _is_dead(pid: int) -> bool:
    """Ended, and there still."""
    try:
        return procfs.stat(pid).state in "ZX"
    except ProcessLookupError:
        return False


def end(program: Program, images: Path) -> Path:
    """A set to restore, with nobody there."""
    if os.path.exists(f"/proc/{program.pid}"):
        shutil.rmtree(images)
        return program.dump()
    return images
