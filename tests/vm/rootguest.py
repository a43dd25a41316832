# SPDX-License-Identifier: Apache-2.0
"""What a guest of tests.vm.rootboot does in one boot: its root disk is /dev/vda, and /dev/vdb has the repository.

A unit of the guest's systemd runs this when everything is up. The step's name is on the kernel's command line.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
from pathlib import Path

from stasis.live.tracker import Mark, Tracker

ROOT, OTHER = "/dev/vda", "/dev/vdb"
STATE, PLACE = Path("/var/lib/stasis"), Path("/other")
REPO, RESTORED, MARK = PLACE / "repo", PLACE / "restored", PLACE / "mark"
MIB = 1 << 20
FREEZE = ("--max-freeze", "60s", "--busy-freeze", "60s")  # an emulated machine is slow


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    print("+", *command, done.returncode, done.stdout, done.stderr, flush=True)
    assert done.returncode == 0, command
    return done.stdout


def said() -> str:
    """What tracking told the journal of this boot, and in the initramfs."""
    units = [word for unit in ("-root", "-early", "") for word in ("-u", f"stasis-track{unit}.service")]
    return run("journalctl", "-b", "-o", "cat", *units)


def back_up() -> dict[str, object]:
    """Back the root disk up as it runs; the new backup."""
    made = run("stasis", "backup", "create", ROOT, "--repo", REPO, *FREEZE, "--json").splitlines()[-1]
    backup: dict[str, object] = json.loads(made)["backups"][0]
    assert backup["consistency"] == "frozen", backup
    return backup


def write(name: str) -> None:
    Path(f"/root/{name}").write_bytes(os.urandom(3 * MIB))
    Path("/root/same").write_bytes(os.urandom(100_000))


def begin() -> None:
    """Tracking begins. The host finds the record of it on the other disk, for the hook of the initramfs."""
    run("mkfs.ext4", "-q", OTHER)
    PLACE.mkdir()
    run("mount", OTHER, PLACE)
    run("stasis", "track", "start", ROOT)
    (PLACE / "device.json").write_bytes((STATE / "live/vda/device.json").read_bytes())
    run("stasis", "repo", "init", REPO, "--no-encryption")
    assert back_up()["kind"] == "full"
    write("first")


def taken_up() -> None:
    """The map was carried over, and the backup by it is incremental; what is in it the next boot sees."""
    assert "vda: taken up" in said()
    run("mount", OTHER, PLACE)
    write("second")
    backup = back_up()
    assert backup["kind"] == "incremental", backup
    MARK.write_text(json.dumps([backup["generation"], backup["change_number"]]))
    run("stasis", "backup", "restore", "latest", RESTORED, "--repo", REPO, "--overwrite")
    write("third")


def compare() -> None:
    """All of the disk that is not as in the last backup is said to have changed since, and that is not everything."""
    assert "vda: taken up" in said()
    run("mount", OTHER, PLACE)
    write("fourth")
    os.sync()
    with Tracker.open("vda", STATE) as tracker:
        different = differences(tracker.block_size)
        tracker.check()
        changed = tracker.changed_since(Mark(*json.loads(MARK.read_text())))
        told = {at for offset, length in changed for at in range(offset, offset + length, tracker.block_size)}
    print("different", len(different), "told", len(told), "of", os.stat(RESTORED).st_size // 65536, flush=True)
    assert different
    assert different <= told, sorted(different - told)
    assert sum(length for _, length in changed) < os.stat(RESTORED).st_size // 2


def differences(unit: int) -> set[int]:
    """Offsets of the blocks that the disk has now and the restored backup has not."""
    found = set()
    buffer = mmap.mmap(-1, MIB)
    disk = os.open(ROOT, os.O_RDONLY | os.O_DIRECT)
    with RESTORED.open("rb") as restored:
        for start in range(0, os.stat(RESTORED).st_size, MIB):
            there = buffer[: os.preadv(disk, [buffer], start)]
            before = restored.read(MIB)
            if there != before:
                found |= {start + at for at in range(0, MIB, unit) if there[at : at + unit] != before[at : at + unit]}
    os.close(disk)
    return found


def new_generation() -> None:
    """It is not known what was written meanwhile: that is said, and the backup is a full one."""
    assert "vda: new generation: " in said()
    run("mount", OTHER, PLACE)
    assert back_up()["kind"] == "full"


def main() -> None:
    words = Path("/proc/cmdline").read_text().split()
    step = next(word.removeprefix("step=") for word in words if word.startswith("step="))
    {one.__name__: one for one in (begin, taken_up, compare, new_generation)}[step]()
    print(f"PASSED {step}", flush=True)


if __name__ == "__main__":
    main()
