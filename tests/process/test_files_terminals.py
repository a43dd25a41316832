# SPDX-License-Identifier: Apache-2.0
"""Terminals come back as pairs with their settings, or are the caller's."""

from __future__ import annotations

import os
import pty
import termios
import tty
from pathlib import Path

import pytest

from stasis.errors import DamagedError
from stasis.process.files.characters import pack, unpack
from stasis.process.files.options import FileOptions
from tests.process.cycles import cycle, findings_of

pytestmark = pytest.mark.root


def test_a_pair_keeps_its_number_settings_and_size(tmp_path: Path) -> None:
    def set_up() -> tuple[int, int, str]:
        master, slave = pty.openpty()
        tty.setraw(slave)
        termios.tcsetwinsize(master, (33, 44))
        os.set_blocking(master, False)
        return master, slave, os.ttyname(slave)

    def verify(state: tuple[int, int, str]) -> None:
        master, slave, name = state
        assert os.ttyname(slave) == name
        assert termios.tcgetwinsize(slave) == (33, 44)
        assert not termios.tcgetattr(slave)[3] & termios.ICANON
        assert not os.get_blocking(master)
        os.write(slave, b"out\n")
        assert os.read(master, 100) == b"out\n"
        os.write(master, b"in")
        assert os.read(slave, 100) == b"in"

    cycle(tmp_path / "images", set_up, verify)


def test_a_terminal_with_unread_output_and_no_other_end_is_named(tmp_path: Path) -> None:
    def set_up() -> int:
        master, slave = pty.openpty()
        os.write(slave, b"written")
        os.close(slave)
        return master

    found = findings_of(set_up, tmp_path / "images")
    assert "other end is not open" in str([finding.reason for finding in found])


def test_the_callers_terminal_is_that_of_the_restore(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    callers = os.dup2(slave, 700)
    images = tmp_path / "images"

    def set_up() -> int:
        fd = os.open(os.ttyname(callers), os.O_RDWR | os.O_NOCTTY)
        os.close(callers)
        return fd

    def verify(fd: int) -> None:
        os.write(fd, b"hello")

    try:
        (finding,) = findings_of(set_up, images)
        assert finding.option == "--shell-job"
        options = FileOptions(shell_job=True, inherited={_criu_name(slave): callers})
        cycle(images, set_up, verify, options=options)
        assert os.read(master, 100) == b"hello"
    finally:
        for fd in (master, slave, callers):
            os.close(fd)


def _criu_name(slave: int) -> str:
    status = os.fstat(slave)
    return f"tty[{status.st_rdev:x}:{status.st_dev:x}]"


CHARACTERS = bytes([3, 0x1C, 0x7F, 0x15, 4, 0, 1, 0, 0x11, 0x13, 0x1A, 0, 0x12, 0xF, 0x17, 0x16, 0, 0, 0])
OF_CRIU = [0x157F1C03, 0x10004, 0x1A1311, 0x16170F12, 0, 0, 0, 0, 942683181, 962669873, 1953853216, 544503152,
           1635018093, 1918987552, 2016419947, 875639107, 1667457312, 175403109, 1972764672]  # fmt: skip
"""What CRIU 4.2.1 wrote of a terminal that nobody had set: behind the eighth it is what lay in its memory."""


def test_special_characters_are_as_criu_has_them() -> None:
    packed = pack(CHARACTERS)
    assert (packed[:8], len(packed)) == (OF_CRIU[:8], 19)
    for numbers in (packed, OF_CRIU, list(CHARACTERS)):  # the last is that of older sets of ours
        assert unpack(numbers, "tty-info.img") == CHARACTERS
    few = bytes([3, *bytes(18)])  # where both forms are possible
    assert unpack(pack(few), "") == unpack(list(few), "") == few
    with pytest.raises(DamagedError, match=r"tty-info.img.*too few"):
        unpack([3], "tty-info.img")
