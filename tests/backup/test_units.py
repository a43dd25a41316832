# SPDX-License-Identifier: Apache-2.0
"""The units of scheduled backups: systemd accepts them, and what they run is a command of ours."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from stasis.cli.main import build_parser

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
SERVICE = UNITS / "stasis-backup@.service"
TIMERS = sorted(UNITS.glob("stasis-backup@*.timer"))


def test_the_service_runs_the_sets_of_its_schedule() -> None:
    [line] = re.findall(r"^ExecStart=/usr/local/bin/stasis (.*)$", SERVICE.read_text(), re.MULTILINE)
    arguments = build_parser().parse_args(shlex.split(line.replace("%i", "hourly")))
    assert (arguments.schedule, arguments.sets) == ("hourly", [])
    assert (arguments.run_dir, arguments.state_dir) == ("/run/stasis", "/var/lib/stasis")


@pytest.mark.tool("systemd-analyze")
@pytest.mark.parametrize("timer", TIMERS, ids=lambda path: path.name)
def test_a_timer_and_its_service_are_accepted(timer: Path, tmp_path: Path) -> None:
    for unit in (SERVICE, timer):
        text = unit.read_text().replace("/usr/local/bin/stasis", str(shutil.which("true")))
        (tmp_path / unit.name).write_text(re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE))
    # As root of a run it is what an administrator would start, not the template.
    name = timer.name.replace("@.", "@night.")
    (tmp_path / timer.name).rename(tmp_path / name)
    result = subprocess.run(["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))],
                            capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.tool("systemd-analyze")
@pytest.mark.parametrize("timer", TIMERS, ids=lambda path: path.name)
def test_a_timer_comes_up_with_its_time(timer: Path) -> None:
    [calendar] = re.findall(r"^OnCalendar=(.*)$", timer.read_text(), re.MULTILINE)
    schedule = timer.name.partition("@")[2].removesuffix(".timer")
    assert calendar == (schedule or "daily")
    subprocess.run(["systemd-analyze", "calendar", calendar], check=True, capture_output=True)


def test_block_devices_stay_within_reach() -> None:
    """These would hide them: PrivateDevices, and ProtectClock, which brings a list of allowed devices with it."""
    assert not re.search(r"^(PrivateDevices|ProtectClock|DevicePolicy|DeviceAllow)=", SERVICE.read_text(), re.MULTILINE)
