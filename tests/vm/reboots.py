# SPDX-License-Identifier: Apache-2.0
"""Tracking over reboots of a real kernel: `tools/vmtest run -d 96M -d 64M -d 320M -d 1G -- python -m tests.vm.reboots`.

Each boot makes one step of STEPS: it checks what became of the maps, and ends in its own way. Disk 0 is as a root disk:
it has the state directory, is mounted read-only when tracking starts, and read-only again at the end. Disks 1 (ext4)
and 2 (XFS) are unmounted at the end. Disk 3 remembers: copies of the others, and the marks at which they were made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from stasis.block.frontend.node import load_module
from stasis.live.tracker import Mark, Tracker
from tests.live.writers import read_direct
from tests.vm.machine import MIB, Disk, run, take_step

ROOT, DATA, LOGGED, MEMORY = (Disk.by_serial(f"disk{number}").path for number in range(4))
COPIES = {ROOT: 16 * MIB, DATA: 160 * MIB, LOGGED: 300 * MIB}
PLACE = Path("/root-disk")
STATE = PLACE / "state"
MOUNTS = {DATA: Path("/data"), LOGGED: Path("/logged")}
TAKEN_UP = "taken up"


def stasis(*arguments: str) -> dict[str, str]:
    """What the command says became of each device."""
    command = [sys.executable, "-m", "stasis", "track", *arguments, "--json"]
    environment = {**os.environ, "STASIS_STATE_DIR": str(STATE), "STASIS_RUN_DIR": "/run/stasis"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {f"/dev/{one['device']}": one["result"] for one in json.loads(done.stdout) if "result" in one}


# -- what the disks were -----------------------------------------------------------------------------------------------


def remember() -> None:
    """Take a mark of each device, and then a copy of it."""
    marks = {}
    for node, offset in COPIES.items():
        with Tracker.open(node, STATE) as tracker:
            mark = tracker.switch().settle()
        marks[node] = [mark.generation, mark.number]
        os.sync()
        with open(MEMORY, "r+b", buffering=0) as memory:
            for at in range(0, Disk(node).size, MIB):
                memory.seek(offset + at)
                memory.write(read_direct(node, at, min(MIB, Disk(node).size - at)))
    with open(MEMORY, "r+b", buffering=0) as memory:
        memory.write(json.dumps(marks).encode().ljust(4096))
        os.fsync(memory.fileno())


def check_covered(node: str) -> None:
    """All that is different now from the copy is in the answer to "changed since its mark", which is not everything."""
    os.sync()
    with open(MEMORY, "rb") as memory:
        mark = Mark(*json.loads(memory.read(4096))[node])
    with Tracker.open(node, STATE) as tracker:
        tracker.check()
        changed, unit = tracker.changed_since(mark), tracker.block_size
    told = {at for offset, length in changed for at in range(offset, offset + length, unit)}
    different = set()
    for at in range(0, Disk(node).size, unit):
        length = min(unit, Disk(node).size - at)
        if read_direct(node, at, length) != read_direct(MEMORY, COPIES[node] + at, length):
            different.add(at)
    assert different, node
    assert different <= told, (node, sorted(different - told))
    assert sum(length for _, length in changed) < Disk(node).size


# -- boot and shutdown -------------------------------------------------------------------------------------------------


def boot() -> dict[str, str]:
    """What units and initramfs do: start tracking, mount, take the maps up."""
    PLACE.mkdir(exist_ok=True)
    run("mount", "-o", "ro", ROOT, PLACE)
    early = stasis("resume", "--early", "--no-wait")
    assert set(early.values()) == {"tracked"}, early
    run("mount", "-o", "remount,rw", PLACE)
    mount_data()
    return stasis("resume")


def mount_data() -> None:
    for node, place in MOUNTS.items():
        place.mkdir(exist_ok=True)
        run("mount", node, place)


def write(name: str) -> None:
    for place in (PLACE, *MOUNTS.values()):
        (place / name).write_bytes(os.urandom(2 * MIB))
        (place / "same").write_bytes(os.urandom(100_000))
        for old in sorted(place.glob("file-*"))[:-2]:
            old.unlink()


def unmount_data() -> None:
    os.sync()
    for place in MOUNTS.values():
        run("umount", place)


def shut_down() -> None:
    unmount_data()
    said = stasis("save")
    assert (said[DATA], said[LOGGED]) == ("saved", "saved"), said
    (PLACE / "late").write_bytes(os.urandom(MIB))
    run("mount", "-o", "remount,ro", PLACE)
    assert stasis("save", "--final") == {ROOT: "saved"}


def cut_power() -> None:
    Path("/proc/sysrq-trigger").write_text("b")


# -- steps -------------------------------------------------------------------------------------------------------------


def begin() -> None:
    """Everything is new; an orderly end."""
    run("mkfs.ext4", "-q", ROOT)
    run("mkfs.ext4", "-q", DATA)
    run("mkfs.xfs", "-q", "-f", LOGGED)
    PLACE.mkdir(exist_ok=True)
    run("mount", ROOT, PLACE)
    stasis("start", *COPIES)
    mount_data()
    write("file-1")
    remember()
    write("file-2")
    shut_down()


def all_is_taken_up() -> None:
    """After an orderly end, and the power goes right behind the next one."""
    said = boot()
    assert set(said.values()) == {TAKEN_UP}, said
    write("file-3")
    for node in COPIES:
        check_covered(node)
    shut_down()
    cut_power()


def saved_is_saved() -> None:
    """The maps were durable before the power went. It goes again, while all is mounted and written."""
    said = boot()
    assert set(said.values()) == {TAKEN_UP}, said
    write("file-4")
    for node in COPIES:
        check_covered(node)
    os.sync()
    cut_power()


def nothing_is_taken_up() -> None:
    """After an end without order; then an orderly one, behind which one disk is mounted, and one written."""
    said = boot()
    assert all(one.startswith("new generation: ") for one in said.values()), said
    remember()
    write("file-5")
    shut_down()
    run("mount", DATA, MOUNTS[DATA])
    run("umount", MOUNTS[DATA])


def only_what_was_left_alone_is_taken_up() -> None:
    """The next boot finds a disk that was written before tracking began."""
    said = boot()
    assert said == {ROOT: TAKEN_UP, LOGGED: TAKEN_UP, DATA: "new generation: its file system was mounted, checked or "
                    "replaced since the map was saved"}, said
    for node in (ROOT, LOGGED):
        check_covered(node)
    write("file-6")
    shut_down()


def written_too_early() -> None:
    """As by an initramfs that mounts for writing before tracking begins; the root comes last, in another boot."""
    with open(LOGGED, "r+b", buffering=0) as disk:
        disk.seek(Disk(LOGGED).size - 4096)
        last = disk.read(4096)
        disk.seek(Disk(LOGGED).size - 4096)
        disk.write(last)
        os.fsync(disk.fileno())
    said = boot()
    assert said == {ROOT: TAKEN_UP, DATA: TAKEN_UP,
                    LOGGED: "new generation: it was written to before tracking began"}, said
    shut_down()


def root_written_too_early() -> None:
    PLACE.mkdir(exist_ok=True)
    run("mount", ROOT, PLACE)
    assert stasis("resume", "--early", "--no-wait")
    said = stasis("resume")
    assert said[ROOT] == "new generation: it was mounted before tracking began", said
    assert said[DATA] == TAKEN_UP, said


STEPS: tuple[Callable[[], None], ...] = (
    begin, all_is_taken_up, saved_is_saved, nothing_is_taken_up, only_what_was_left_alone_is_taken_up,
    written_too_early, root_written_too_early,
)  # fmt: skip


def main() -> None:
    for module in ("loop", "ext4", "xfs"):
        load_module(module)
    take_step(STEPS)


if __name__ == "__main__":
    main()
