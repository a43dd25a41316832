# SPDX-License-Identifier: Apache-2.0
"""The guide's table of the modules' errors is the one that the messages come from."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from stasis.blksnap.meanings import MEANINGS, driver_error
from stasis.errors import BusyError, StasisError

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "kernel-drivers.md"


def test_every_meaning_is_in_the_guide_and_no_other() -> None:
    documented = re.findall(r"^\| ([a-z-]+) \| (E[A-Z]+) \| (.*) \| (\d+) \|$", GUIDE.read_text(), re.MULTILINE)
    assert documented == [
        (call, errno.errorcode[number], meaning.text, str(int(meaning.kind.default_exit_code)))
        for call, table in MEANINGS.items()
        for number, meaning in table.items()
    ]


def test_an_error_names_who_refused_what_of_what() -> None:
    error = driver_error("dattobd", "datto-destroy", "/dev/sdb1", OSError(errno.EBUSY, ""))
    assert (type(error), error.errno) == (BusyError, errno.EBUSY)
    assert error.message == "dattobd refuses destroy of /dev/sdb1: its image is open"
    plain = driver_error("blksnap", "wait", "x", OSError(errno.EIO, ""))
    assert (type(plain), plain.message) == (StasisError, "blksnap refuses wait of x: Input/output error")
