# SPDX-License-Identifier: Apache-2.0
"""A block device that is gone: a loop device of size 0 is what the kernel makes of a removed one.

tests/vm removes a SCSI disk for good.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.block.loops import loop_device
from tests.runner import Stasis
from tests.system.helpers import MIB
from tests.system.removal import EXPECTED, check_removal

pytestmark = [pytest.mark.root, pytest.mark.tool("losetup"), pytest.mark.expects_errors(*EXPECTED)]


def test_a_removed_device_answers_errors_and_can_be_detached(stasis: Stasis, short_dir: Path) -> None:
    backing = short_dir / "backing"
    with loop_device(backing, 16 * MIB) as device:

        def remove() -> None:
            os.truncate(backing, 0)
            subprocess.run(["losetup", "--set-capacity", device], check=True)

        generation = check_removal(stasis, device, remove)
        os.truncate(backing, 16 * MIB)
        subprocess.run(["losetup", "--set-capacity", device], check=True)
        stasis("device", "attach", device, "--name", "disk")
        assert stasis.json("map", "info", "disk")["generation"] != generation
