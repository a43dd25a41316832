# SPDX-License-Identifier: Apache-2.0
"""Commands given at the same moment: of those that exclude each other exactly one wins, the others say why."""

from __future__ import annotations

import json
from pathlib import Path

from stasis.errors import ExitCode
from tests import leaks
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import MIB, wait_until


def _at_once(stasis: Stasis, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and error output of commands that run beside each other."""
    running = [stasis.popen(*command) for command in commands]
    results = []
    for process in running:
        with process:
            output, error = process.communicate(timeout=120)
            results.append((process.returncode, output, error))
    return results


def test_one_of_several_snapshots_of_a_device_wins(stasis: Stasis, make_disk: MakeDisk, storage: Path) -> None:
    disk = make_disk("disk.img", MIB)
    command = ["snapshot", "create", "--storage", str(storage), "--limit", "32M", disk.name, "--take"]
    results = _at_once(stasis, *[command] * 5)
    winners = [output.strip() for code, output, _ in results if code == 0]
    assert len(winners) == 1
    assert stasis.json("snapshot", "collect") == winners
    assert all(code == ExitCode.BUSY and winners[0] in error for code, _, error in results if code != 0)


def test_one_of_several_attaches_wins(stasis: Stasis, short_dir: Path) -> None:
    (short_dir / "disk.img").write_bytes(bytes(MIB))
    results = _at_once(stasis, *[["device", "attach", str(short_dir / "disk.img")]] * 5)
    assert sorted(code for code, _, _ in results) == [ExitCode.OK] + [ExitCode.BUSY] * 4
    assert len(stasis.json("device", "list")) == 1


def test_one_of_two_daemons_gets_a_file(stasis: Stasis, make_disk: MakeDisk, short_dir: Path) -> None:
    disk = make_disk("disk.img", MIB)
    for name in ("run2", "state2"):
        (short_dir / name).mkdir(mode=0o700)
    other = Stasis(short_dir / "run2", short_dir / "state2")
    try:
        assert "in use" in other.fail(ExitCode.BUSY, "device", "attach", disk.path)
        assert other.json("device", "list") == []
    finally:
        other.stop()
    assert disk.read() == disk.expected


def test_ten_commands_start_one_daemon(stasis: Stasis) -> None:
    before = leaks.session_processes()
    results = _at_once(stasis, *[["device", "list", "--json"]] * 10)
    assert [(code, json.loads(output)) for code, output, _ in results] == [(0, [])] * 10
    assert sum("started the daemon" in error for _, _, error in results) == 1
    new = {stasis.daemon_pid()}
    wait_until(lambda: leaks.session_processes() - before == new, "the daemons that came second to end")


def test_snapshots_of_different_devices_do_not_wait_for_each_other(
    stasis: Stasis, make_disk: MakeDisk, storage: Path
) -> None:
    disks = [make_disk(f"disk{number}.img", MIB) for number in range(4)]
    create = ["snapshot", "create", "--storage", str(storage), "--limit", "32M", "--take"]
    results = _at_once(stasis, *[[*create, disk.name] for disk in disks])
    assert [code for code, _, _ in results] == [0] * 4
    shown = stasis.json("snapshot", "list")
    assert sorted(entry["devices"][0]["name"] for entry in shown) == [disk.name for disk in disks]
    for entry, disk in ((entry, disk) for entry in shown for disk in disks):
        if entry["devices"][0]["name"] == disk.name:
            assert disk.read(entry["devices"][0]["uri"]) == disk.expected
