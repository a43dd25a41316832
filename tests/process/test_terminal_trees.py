# SPDX-License-Identifier: Apache-2.0
"""A terminal whose both ends are in the tree is that of its session after a restore, job control included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.programs import PATIENCE, Program, running, wait_for
from tests.process.terminals import low_numbers_taken

pytestmark = pytest.mark.root

SCRIPT = """
import os, pty, sys, time
from pathlib import Path
pid, master = pty.fork()
if pid == 0:
    os.environ["PS1"] = "$ "
    os.execvp("bash", ["bash", "--norc", "--noediting", "-i"])
os.set_blocking(master, False)
said = b""
def step():
    global said
    try:
        said += os.read(master, 4096)
        return True
    except BlockingIOError:
        time.sleep(0.003)
        return False
def wait(text, since=0):
    while text not in said[since:]:
        step()
def write(line):
    since = len(said)
    os.write(master, line.encode() + b"\\n")
    return since
wait(b"$ ")
write("sleep 1000 & cat | tr a-z A-Z")
wait(b"[1] ")
write("one line")
wait(b"ONE LINE")
while step():
    pass
Path("ready").touch()
while not os.path.exists("go"):
    time.sleep(0.003)
since = write("another")
wait(b"ANOTHER", since)
os.write(master, b"\\x04")  # the end of the input
wait(b"$ ", since)
since = write("jobs")
wait(b"Running", since)
since = write("fg")
wait(b"sleep 1000", since)
while os.tcgetpgrp(master) == pid:
    time.sleep(0.003)
os.write(master, b"\\x03")  # SIGINT to the group in front
wait(b"$ ", since)
since = write("tty; exit $((6*7))")
wait(b"/dev/pts/", since)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
Path("content").touch()
"""


def test_a_pipeline_of_a_shell_in_a_terminal(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", SCRIPT) as program:
        program.restore(program.dump())
        program.finish()


WRITER = """
import os, pty, time
from pathlib import Path
pid, master = pty.fork()
if pid == 0:
    while not os.path.exists("go"):
        print("some output, now and then", flush=True)
        time.sleep(0.02)
    os._exit(0)
Path("ready").touch()
said = b""
try:
    while portion := os.read(master, 4096):
        said += portion
        time.sleep(0.001)
except OSError:
    pass  # the other end is closed
assert set(said.split(b"\\r\\n")) == {b"some output, now and then", b""}, said
os.wait()
Path("content").touch()
"""


def test_output_that_is_read_in_a_moment_is_waited_for(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", WRITER) as program:
        program.restore(program.dump())
        program.finish()


@pytest.mark.tool("tmux")
def test_tmux(tmp_path: Path) -> None:
    """The server with a shell in a window, without a client: afterwards one can look at it and type."""
    socket = tmp_path / "tmux"
    command = ["tmux", "-f", "/dev/null", "-S", str(socket)]
    environment = {**os.environ, "PS1": "$ ", "TERM": "screen"}
    with low_numbers_taken():
        subprocess.run([*command, "new-session", "-d", "-x", "80", "-y", "24", "bash --norc"], check=True,
                       timeout=PATIENCE, cwd=tmp_path, env=environment)  # fmt: skip

    def run(*words: str) -> str:
        return subprocess.run([*command, *words], check=True, timeout=PATIENCE, capture_output=True, text=True).stdout

    pid = int(run("display-message", "-p", "#{pid}"))
    try:
        run("send-keys", "echo before-$((1+1))", "Enter")
        wait_for(lambda: _answered("before-2", run("capture-pane", "-p")), "the shell does not answer")
        program = Tmux(tmp_path, pid)
        program.restore(program.dump("--file-locks"))
        assert "before-2" in run("capture-pane", "-p")
        run("send-keys", "echo after-$((1+1)); tty", "Enter")
        wait_for(lambda: "after-2" in run("capture-pane", "-p"), "the shell does not answer after the restore")
        wait_for(lambda: "/dev/pts/" in run("capture-pane", "-p"), "it has no terminal")
    finally:
        subprocess.run([*command, "kill-server"], check=False, timeout=PATIENCE)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"), "tmux does not end")


def _answered(answer: str, screen: str) -> bool:
    """Whether the answer and the next prompt are there: nothing more is on its way."""
    return f"\n{answer}\n" in screen and screen.rstrip().endswith(("$", "#"))


class Tmux(Program):
    """A server that is no child of ours."""

    def __init__(self, directory: Path, pid: int) -> None:
        with subprocess.Popen(["true"]) as nobody:
            super().__init__(directory, nobody)
        self.pid = pid
