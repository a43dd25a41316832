# SPDX-License-Identifier: Apache-2.0
"""Terminals come back as pairs with their settings, or are the caller's."""

from __future__ import annotations

import os
import pty
import termios
import tty
from pathlib import Path

import pytest

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
