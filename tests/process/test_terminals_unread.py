# SPDX-License-Identifier: Apache-2.0
"""What waits in a terminal to be read is there after a restore, and the process that was dumped notices nothing."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import select
import signal
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.process.files import unread
from stasis.process.files.unread import Pair, held_outside, looked_at
from tests.process.cycles import cycle, findings_of
from tests.process.programs import running

pytestmark = pytest.mark.root

EVERY_BYTE = bytes(range(256))
LINES = b"one line\nand two\x04\x04part\x16\x7fof \x16\x03another\x16\x16\x16\x04"
"""Typed: a line, what ^D ended, ^D alone, and the beginning of a line with characters that were quoted by ^V."""
PROGRAM = """
import os, pty, termios, time, tty
from pathlib import Path
EVERY_BYTE = bytes(range(256))
raw_master, raw_slave = pty.openpty()
tty.setraw(raw_slave)
os.write(raw_master, EVERY_BYTE)
os.write(raw_slave, b"answer\\n" + EVERY_BYTE)
master, slave = pty.openpty()
os.write(master, LINES)
echoed = b""
while not echoed.endswith(b"^D"):
    echoed += os.read(master, 1)
os.write(slave, b"prompt\\n")
Path("ready").touch()
settings = termios.tcgetattr(slave)
while not os.path.exists("go"):
    time.sleep(0.003)
assert termios.tcgetattr(slave) == settings
assert os.read(raw_slave, 1000) == EVERY_BYTE
assert os.read(raw_master, 1000) == b"answer\\n" + EVERY_BYTE
assert os.read(slave, 1000) == b"one line\\n"
assert os.read(slave, 1000) == b"and two"
assert os.read(slave, 1000) == b""
assert os.read(master, 1000) == b"prompt\\r\\n"
os.write(master, b"x\\x7f!\\n")
assert os.read(slave, 1000) == b"part\\x7fof \\x03another\\x16\\x04!\\n"
Path("content").touch()
"""


def test_lines_and_bytes_in_both_directions(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", f"LINES = {LINES!r}\n{PROGRAM}") as program:
        program.again_and_again()
        program.finish()


def test_packet_mode_and_a_locked_pair(tmp_path: Path) -> None:
    def set_up() -> tuple[int, int]:
        master, slave = pty.openpty()
        tty.setraw(slave)
        fcntl.ioctl(master, unread.TIOCPKT, struct.pack("i", 1))
        os.write(slave, b"out")
        os.write(master, b"in")
        fcntl.ioctl(master, unread.TIOCSPTLCK, struct.pack("i", 1))
        return master, slave

    def verify(state: tuple[int, int]) -> None:
        master, slave = state
        assert os.read(master, 100) == b"\0out"
        assert os.read(slave, 100) == b"in"
        assert unread.get(master, unread.TIOCGPTLCK)
        assert not select.select([master], [], [master], 0)[0]

    cycle(tmp_path / "images", set_up, verify)


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    ends = pty.openpty()
    yield ends
    for fd in ends:
        os.close(fd)


def _fill(slave: int, piece: int) -> bytes:
    """Write until nothing more goes in, also when the kernel has handed on all that it can."""
    os.set_blocking(slave, False)
    sent, refused = b"", 0
    while refused < 200:
        data = os.urandom(piece)
        try:
            sent += data[: os.write(slave, data)]
        except BlockingIOError:
            refused += 1
    return sent


@pytest.mark.parametrize("piece", [100, 256, 3500, 9000])
def test_as_much_as_fits(pair: tuple[int, int], piece: int) -> None:
    master, slave = pair
    tty.setraw(slave)
    sent = _fill(slave, piece)
    for _ in range(2):
        (found,) = looked_at([master])
        assert found.output == sent
    got = b""
    while select.select([master], [], [], 0)[0]:
        got += os.read(master, 1 << 16)
    assert got == sent


def test_output_that_a_key_stopped_is_stopped(pair: tuple[int, int]) -> None:
    master, slave = pair
    os.write(slave, b"before")
    os.write(master, termios.tcgetattr(slave)[6][termios.VSTOP])
    _until(slave, stopped=True)
    assert looked_at([master])[0].output == b"before"
    assert not select.select([], [slave], [], 0)[1]
    os.write(master, termios.tcgetattr(slave)[6][termios.VSTART])
    _until(slave, stopped=False)


def test_output_that_a_call_stopped_is_stopped(pair: tuple[int, int]) -> None:
    master, slave = pair
    os.write(slave, b"before")
    termios.tcflow(slave, termios.TCOOFF)
    assert looked_at([master])[0].output == b"before"
    assert not select.select([], [slave], [], 0)[1]
    termios.tcflow(slave, termios.TCOON)
    assert select.select([], [slave], [], 0)[1]


def _until(slave: int, *, stopped: bool) -> None:
    for _ in range(100_000):
        if bool(select.select([], [slave], [], 0)[1]) != stopped:
            return
        os.sched_yield()
    raise AssertionError("the terminal does not follow")


def test_nothing_changes_where_nothing_waits(pair: tuple[int, int]) -> None:
    master, slave = pair
    before = termios.tcgetattr(slave)
    with Pair(master) as ours:
        assert ours.look() == (b"", b"")
    assert termios.tcgetattr(slave) == before
    os.write(master, b"typed\n")
    assert os.read(slave, 100) == b"typed\n"


def test_who_asked_is_killed_and_nothing_is_lost(pair: tuple[int, int], seed: int) -> None:
    master, slave = pair
    draw = random.Random(seed)
    os.write(master, LINES)
    os.write(slave, EVERY_BYTE)
    (before,) = looked_at([master])
    settings = termios.tcgetattr(slave)
    for _ in range(20):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            while True:
                looked_at([master])
        time.sleep(draw.uniform(0, 0.02))  # any moment will do
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(writer)
        assert not os.read(reader, 1)  # the helper, which has the other end, has ended
        os.close(reader)
        assert termios.tcgetattr(slave) == settings
    assert looked_at([master]) == [before]


def test_a_terminal_that_others_have_open_is_named(tmp_path: Path) -> None:
    kept: list[int] = []
    master, slave = pty.openpty()
    master_there, slave_there = os.dup2(master, 700), os.dup2(slave, 701)

    def set_up() -> None:
        kept.extend((os.dup(master_there), os.dup(slave_there)))
        os.close(master_there)
        os.close(slave_there)
        os.write(kept[0], b"typed\n")

    try:
        found = findings_of(set_up, tmp_path / "images")
        assert "outside the tree" in str([finding.reason for finding in found])
        assert int(Path(os.ttyname(slave)).name) not in held_outside([os.getpid()])
    finally:
        for fd in (master, slave, master_there, slave_there):
            os.close(fd)
