# SPDX-License-Identifier: Apache-2.0
"""The disk that everything runs from is tracked and backed up while it is used, and holds what was there at the freeze.

Here it is the root disk of a mount namespace, so that all that stasis loads and keeps lies on the disk that it freezes.
With STASIS_LONG=1 it is the root disk of this machine too, if root may open it and its contents fit into memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stasis.linux import blockdev, freeze, memlock, mounts
from tests.live.disks import fast_folder, loop, mounted, tool
from tests.live.rootdisk import COVERED, HASHED_FIELDS, entries
from tests.live.smallroot import SmallRoot, small_root
from tests.live.writers import bpf_works
from tests.system.helpers import LONG

pytestmark = [pytest.mark.root, pytest.mark.tool("mkfs.ext4", "losetup", "unshare", "nsenter", "pivot_root"),
              pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

STATE = "/var/lib/stasis-test"
PATIENCE = 60.0
"""Seconds after which the root disk of this machine is thawed, whatever stasis and its watchdog did."""
OPTIONS = {"ext4": "ro", "xfs": "ro,norecovery,nouuid", "btrfs": "ro"}


def check(made: dict[str, Any], kind: str, where: Path, fstype: str = "ext4", top: str = "/") -> None:
    """One attempt sufficed, and each file that was there at the freeze, and no other, is in the image."""
    assert (made["kind"], made["consistency"], made["warnings"]) == (kind, "frozen", [])
    expected = json.loads(Path(made["list"]).read_text())
    with loop(Path(made["image"])) as node, \
            mounted(node, where / "restored", "-t", fstype, "-o", OPTIONS[fstype]) as directory:
        found = dict(entries(f"{directory}{top}", f"{STATE.strip('/')}-files" if top == "/" else ""))
    assert sum(what.count(" ") == HASHED_FIELDS for what in expected.values()) > 10  # contents of what is written now
    assert expected.keys() == found.keys()
    assert {name: what for name, what in found.items() if expected[name] not in (what, COVERED)} == {}


SCRIPT = str(Path(__file__).with_name("rootdisk.py"))


def own_directories(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "STASIS_STATE_DIR": STATE, "STASIS_RUN_DIR": f"/run{STATE}"}


def backups(command: list[str], node: str, folder: Path, environment: dict[str, str], limit: str,
            top: str = "/") -> Iterator[dict[str, Any]]:
    done = subprocess.run([*command, SCRIPT, node, str(folder), limit, top], capture_output=True, text=True,
                          env=own_directories(environment), check=False)
    assert done.returncode == 0, done.stderr
    return (json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRoot]:
    with small_root(tmp_path_factory.mktemp("root")) as made:
        yield made


def test_the_disk_that_everything_runs_from(root: SmallRoot, tmp_path: Path) -> None:
    """No module has been compiled there before: one that is first loaded in the freeze would wait for its end."""
    with fast_folder(tmp_path) as folder:
        full, incremental = backups(root.command, root.node, folder, root.environment, "20s")
        for made, kind in ((full, "full"), (incremental, "incremental")):
            assert made["attempts"] == 1
            check(made, kind, tmp_path)


ENDS = {"SIGSTOP": ("5s", os.CLD_STOPPED), "SIGKILL": ("20s", os.CLD_KILLED)}


@pytest.mark.parametrize("how", ENDS if LONG else ["SIGSTOP"])
def test_who_copies_the_disk_that_all_runs_from_may_end_there(root: SmallRoot, tmp_path: Path, how: str) -> None:
    """The watchdog's program lies on the frozen disk as well; it thaws, and who writes goes on."""
    with fast_folder(tmp_path) as folder:
        limit, expected = ENDS[how]
        command = [*root.command, SCRIPT, root.node, str(folder), limit, "/", how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                              env=own_directories(root.environment)) as process:
            try:
                assert process.stdout is not None
                writer = json.loads(process.stdout.readline())
                ended = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                assert ended is not None
                assert ended.si_code == expected
                for name in "ab":
                    (root.top / name).write_text("returns when it is thawed")
            finally:
                process.kill()
                process.wait()
                os.kill(writer, signal.SIGKILL)
        subprocess.run([*root.command, "-m", "stasis", "track", "stop", root.node], check=True,
                       env=own_directories(root.environment))


@pytest.fixture
def own_root() -> Iterator[tuple[str, str]]:
    """Device and type of the root file system of this machine, which is thawed in any case."""
    found = next(mount for mount in mounts.mounts() if mount.target == "/")
    size, node = os.statvfs("/"), blockdev.node(os.stat("/").st_dev) or found.source
    try:
        os.close(os.open(node, os.O_RDONLY))
    except OSError as error:
        pytest.skip(f"the root disk {node} cannot be read: {error.strerror}")
    if found.fstype not in OPTIONS:
        pytest.skip(f"the root file system is {found.fstype}")
    if (size.f_blocks - size.f_bfree) * size.f_frsize * 3 > memlock.available():
        pytest.skip("the contents of the root disk do not fit into memory")
    fd = os.open("/", os.O_RDONLY)
    with subprocess.Popen([sys.executable, "-c", FAILSAFE, str(PATIENCE)], stdin=subprocess.PIPE) as failsafe:
        try:
            yield node, found.fstype
        finally:
            freeze.thaw(fd)
            os.close(fd)
            failsafe.communicate(b"\n")


FAILSAFE = """
import os, select, sys
from stasis.linux import freeze, memlock
fd = os.open("/", os.O_RDONLY)
memlock.lock_all()
while not select.select([0], [], [], float(sys.argv[1]))[0]:
    freeze.thaw(fd)
"""


@pytest.mark.skipif(not LONG, reason="freezes the root disk of this machine; STASIS_LONG=1 runs it")
@pytest.mark.timeout(3600)
def test_the_root_disk_of_this_machine(own_root: tuple[str, str], tmp_path: Path) -> None:
    """Only the files that are being written are listed: all others would take longer than a freeze may."""
    node, fstype = own_root
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(fast_folder(tmp_path))
        stack.callback(tool, "rm", "-rf", STATE, f"/run{STATE}", f"{STATE}-files")
        for made, kind in zip(backups([sys.executable], node, folder, dict(os.environ), "500ms", f"{STATE}-files"),
                              ("full", "incremental"), strict=True):
            check(made, kind, tmp_path, fstype, f"{STATE}-files")
