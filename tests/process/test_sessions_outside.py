# SPDX-License-Identifier: Apache-2.0
"""Processes of a pid namespace whose session is led from outside of it, as those that `docker exec` starts: their
session and group have no number there (0), and after a restore they are in those of the restorer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from stasis.linux import procfs
from tests.process.programs import PATIENCE, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("unshare"), pytest.mark.tool("nsenter")]

PROGRAM = """
import os, sys, time
from pathlib import Path
def ids():
    return f"{os.getsid(0)} {os.getpgid(0)}"
assert ids() == "0 0"
child = os.fork()
name = "child" if child == 0 else "parent"
Path(f"ready-{name}").touch()
asked = 0
while not os.path.exists("stop"):
    if os.path.exists(f"ask-{asked}"):
        Path(f"new-{name}").write_text(ids())
        os.rename(f"new-{name}", f"{name}-{asked}")
        asked += 1
    time.sleep(0.003)
if child:
    assert os.waitpid(child, 0)[1] == 0
    Path("content").touch()
"""
FIRST = f"""{sys.executable} -c "$PROGRAM" &
echo $! > pid
while [ ! -e stop ]; do sleep 0.02; done
wait
"""
"""The first process of the namespace. It has no children of the tree after a restore, and adopts them."""


class Inside:
    """The namespace, with the program in it."""

    def __init__(self, directory: Path, first: int) -> None:
        self.directory = directory
        self.pid = int((directory / "pid").read_text())
        self._first = first
        self._asked = 0

    def stasis(self, *words: object, status: int = 0, before: tuple[str, ...] = ()) -> str:
        """Run `stasis process` inside, in a session that is led from outside, or behind the words of `before`."""
        enter = ["nsenter", "--target", str(self._first), "--pid", "--mount", *before]
        command = [*enter, sys.executable, "-m", "stasis", "process", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done.stdout if status == 0 else done.stderr

    def ids(self) -> set[str]:
        """Session and group of the program's processes, as they see them."""
        (self.directory / f"ask-{self._asked}").touch()
        answers = [self.directory / f"{name}-{self._asked}" for name in ("parent", "child")]
        wait_for(lambda: all(answer.exists() for answer in answers), "the program does not answer")
        self._asked += 1
        return {answer.read_text() for answer in answers}


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", FIRST]
    with (
        open(tmp_path / "errors", "wb") as errors,
        subprocess.Popen(
            command, cwd=tmp_path, env={"PROGRAM": PROGRAM, "PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL,
            stdout=errors, stderr=errors, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            ready = [tmp_path / f"ready-{name}" for name in ("parent", "child")]
            wait_for(lambda: all(one.exists() for one in ready) or process.poll(), "the program is not set up")
            (first,) = procfs.children(process.pid, process.pid)
            yield Inside(tmp_path, first)
        finally:
            (tmp_path / "stop").touch()
            process.kill()
    assert not (tmp_path / "errors").read_text()


def test_it_takes_the_option_for_jobs_of_a_shell(inside: Inside) -> None:
    said = inside.stasis("dump", inside.pid, "--images", inside.directory / "images", status=ExitCode.UNSUPPORTED)
    assert "outside of its pid namespace" in said
    assert "--shell-job" in said


def test_it_comes_back_in_the_session_of_the_restorer(inside: Inside) -> None:
    def images(number: int) -> Path:
        return inside.directory / f"images-{number}"

    inside.stasis("dump", inside.pid, "--images", images(0), "--shell-job", "--leave-running")
    assert inside.ids() == {"0 0"}
    inside.stasis("dump", inside.pid, "--images", images(1), "--shell-job")
    assert int(inside.stasis("restore", "--images", images(1))) == inside.pid
    assert inside.ids() == {"0 0"}
    inside.stasis("dump", inside.pid, "--images", images(2), "--shell-job")
    assert int(inside.stasis("restore", "--images", images(2), before=("setsid", "--wait"))) == inside.pid
    (ids,) = inside.ids()
    session, group = ids.split()
    assert session == group != "0"
    inside.stasis("dump", inside.pid, "--images", images(3), "--shell-job")
