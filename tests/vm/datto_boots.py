# SPDX-License-Identifier: Apache-2.0
"""A tracer over reboots of a real kernel: `tools/vmtest run -d 192M -d 64M -- python -m tests.vm.datto_boots`.

Each boot makes one step of STEPS and ends in its own way. Disk 0 has the state directory, the COW files and the copy
that update-img keeps; disk 1 is the origin, whose file system is only mounted from its kernel node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stasis.block.frontend.node import load_module
from stasis.datto.layout import Header
from tests.vm.machine import MIB, Disk, run, take_step

KEPT, ORIGIN = (Disk.by_serial(f"disk{number}").path for number in range(2))
PLACE, DATA = Path("/kept"), Path("/data")
COPY = PLACE / "copy"
SECONDS = 120


def tool(module: str, *words: str | Path, status: int = 0) -> str:
    environment = {**os.environ, "STASIS_STATE_DIR": str(PLACE / "state"), "STASIS_RUN_DIR": "/run/stasis"}
    done = subprocess.run([sys.executable, "-m", module, *map(str, words)], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == status, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout


def dbdctl(*words: str | Path, status: int = 0) -> None:
    tool("stasis.cli.dbdctl", *words, status=status)


def tracer() -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(tool("stasis", "datto", "show", "0", "--json"))
    return shown


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def boot() -> str:
    """The daemon serves what it served; the node of the origin."""
    PLACE.mkdir(exist_ok=True)
    run("mount", KEPT, PLACE)
    (device,) = json.loads(tool("stasis", "device", "list", "--json"))
    return str(device["node"])


def mount(node: str) -> None:
    DATA.mkdir(exist_ok=True)
    run("mount", node, DATA)


def write(name: str) -> None:
    (DATA / name).write_bytes(os.urandom(2 * MIB))
    (DATA / "same").write_bytes(os.urandom(100_000))
    os.sync()


def next_snapshot(number: int) -> None:
    """On to the next snapshot, and the copy with it."""
    dbdctl("transition-to-snapshot", PLACE / f"cow{number}", "0")
    write("not in it")
    said = tool("stasis.cli.update_img", "/dev/datto0", PLACE / f"cow{number - 1}", COPY)
    assert said.endswith(" 0 errors\n"), said
    run("cmp", "/dev/datto0", COPY)


def shut_down() -> None:
    run("umount", DATA)
    tool("stasis", "daemon", "stop")
    await_true(lambda: not Path("/run/stasis/control.sock").exists())
    run("umount", PLACE)


def cut_power() -> None:
    Path("/proc/sysrq-trigger").write_text("b")


# -- steps -------------------------------------------------------------------------------------------------------------


def begin() -> None:
    """A series; an orderly end in incremental mode."""
    run("mkfs.ext4", "-q", KEPT)
    PLACE.mkdir(exist_ok=True)
    run("mount", KEPT, PLACE)
    tool("stasis", "device", "attach", ORIGIN, "--kernel")
    (device,) = json.loads(tool("stasis", "device", "list", "--json"))
    run("mkfs.ext4", "-q", device["node"])
    mount(device["node"])
    write("file1")
    dbdctl("setup-snapshot", "-f", "24", device["node"], PLACE / "cow0", "0")
    run("dd", "if=/dev/datto0", f"of={COPY}", "bs=1M", "conv=fsync")
    dbdctl("transition-to-incremental", "0")
    write("file2")
    shut_down()


def after_an_orderly_end() -> None:
    """All is there; the power goes while the origin is mounted and written."""
    mount(boot())
    assert tracer()["state_name"] == "active incremental"
    write("file3")
    next_snapshot(1)
    dbdctl("transition-to-incremental", "0")
    write("file4")
    (DATA / "open").write_bytes(os.urandom(MIB))
    cut_power()


def after_a_power_cut() -> None:
    """What changed is known. The power goes again while a snapshot rests, unmounted."""
    node = boot()
    assert tracer()["state_name"] == "active incremental", tracer()
    mount(node)
    write("file5")
    next_snapshot(2)
    run("umount", DATA)
    await_true(lambda: Header.unpack((PLACE / "cow2").read_bytes()[:64], "cow2").is_clean)
    cut_power()


def after_a_rest() -> None:
    """The snapshot is whole. An orderly end, behind which somebody mounts the disk itself."""
    node = boot()
    assert tracer()["state_name"] == "active snapshot", tracer()
    await_true(lambda: os.path.exists("/dev/datto0"))
    run("cmp", "/dev/datto0", COPY)
    dbdctl("transition-to-incremental", "0")
    mount(node)
    write("file6")
    shut_down()
    run("mount", ORIGIN, DATA)
    write("behind its back")
    run("umount", DATA)


def after_others_wrote() -> None:
    """The series ends, and says so."""
    boot()
    shown = tracer()
    assert shown["error"] == -22, shown
    assert "may have been missed" in shown["reason"], shown
    dbdctl("transition-to-snapshot", PLACE / "cow3", "0", status=255)
    dbdctl("destroy", "0")
    tool("stasis", "device", "detach", Path(ORIGIN).name)
    run("e2fsck", "-fn", ORIGIN)


STEPS: tuple[Callable[[], None], ...] = (
    begin, after_an_orderly_end, after_a_power_cut, after_a_rest, after_others_wrote,
)  # fmt: skip


def main() -> None:
    for module in ("nbd", "ext4"):
        load_module(module)
    take_step(STEPS)


if __name__ == "__main__":
    main()
