# SPDX-License-Identifier: Apache-2.0
"""Tracking that starts in an initramfs: the hooks copy all that it takes, and it works with nothing else around it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stasis.live import lasting, pins, tracking
from stasis.live.devicefile import DeviceFile
from stasis.live.tracker import Mark, Tracker
from tests.live.disks import mounted, tool
from tests.live.test_track_reboot import ANOTHER_BOOT, name_of
from tests.live.writers import MIB, bpf_works, loop_device
from tests.system.helpers import LONG

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices"),
              pytest.mark.tool("mkfs.ext4", "unshare", "ldd")]

ONLY_LONG = pytest.mark.skipif(not LONG, reason="one of two is enough; STASIS_LONG=1 runs both")
PACKAGING = Path(__file__).parents[2] / "packaging"
# What initramfs-tools' copy_exec does: a file, and the libraries that it is linked with.
COPY = """
put() { [ -e "$ROOT$1" ] || { mkdir -p "$ROOT${1%/*}" && cp -pL "$1" "$ROOT$1"; }; }
put_exec() {
    put "$1"
    case $1 in *.py | *.pyc | *.json) return ;; esac
    for library in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*'); do put "$library"; done
}
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "image", 24 * MIB) as node:
        tool("mkfs.ext4", "-q", "-F", node)
        yield node


@pytest.fixture
def mark(node: str, state: Path) -> Mark:
    with tracking.start(node, state) as tracker:
        return tracker.switch().settle()


@pytest.fixture
def environment(tmp_path: Path, state: Path) -> dict[str, str]:
    """As on a machine where stasis is installed, here by a command of this very interpreter."""
    command = tmp_path / "stasis"
    command.write_text(f"#!{sys.executable}\n")
    command.chmod(0o755)
    return {**os.environ, "STASIS": str(command), "STASIS_STATE_DIR": str(state),
            "PYTHONPATH": str(PACKAGING.parent / "src")}


def initramfs_tools(tree: Path, environment: dict[str, str]) -> str:
    """Run the hook of initramfs-tools, with its functions replaced; gives what the initramfs runs."""
    functions = tree.parent / "hook-functions"
    functions.write_text(f"ROOT=$DESTDIR\n{COPY}\ncopy_exec() {{ put_exec \"$1\"; }}\n")
    text = (PACKAGING / "initramfs-tools/hooks/stasis-track").read_text()
    assert "/usr/share/initramfs-tools/hook-functions" in text
    text = text.replace("/usr/share/initramfs-tools/hook-functions", str(functions))
    subprocess.run(["sh", "-c", text, "hook"], env={**environment, "DESTDIR": str(tree)}, check=True)
    return (PACKAGING / "initramfs-tools/scripts/stasis-track").read_text()


def dracut(tree: Path, environment: dict[str, str]) -> str:
    """The same with dracut's module. Its end looks for libraries of what is executable only, and Debian's modules of
    Python are not."""
    (tree / "usr/lib").mkdir(parents=True)
    moddir = PACKAGING / "dracut/90stasis-track"
    text = f"""ROOT={tree}; initdir={tree}; moddir={moddir}; {COPY}
inst() {{ put "$1"; case $1 in *.so) chmod 644 "$ROOT$1" ;; esac; }}
inst_hook() {{ [ "$1 $2" = "pre-mount 10" ] && cp "$3" {tree}/hook.sh; }}
. {moddir}/module-setup.sh; check && depends && install
find {tree} -type f -perm /0111 | while read -r file; do put_exec "${{file#{tree}}}"; done"""
    subprocess.run(["bash", "-ec", text], env=environment, check=True)
    return (tree / "hook.sh").read_text()


@pytest.mark.parametrize("build", [initramfs_tools, pytest.param(dracut, marks=ONLY_LONG)])
def test_tracking_starts_with_nothing_but_what_was_copied(
    build: Callable[[Path, dict[str, str]], str], tmp_path: Path, node: str, state: Path, mark: Mark,
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    assert lasting.save(state) == [(name_of(node), lasting.SAVED)]
    pins.remove(pins.directory_of(state))
    for path in state.glob("live/*/device.json"):
        path.write_text(re.sub(r'"boot": "[^"]*"', f'"boot": "{ANOTHER_BOOT}"', path.read_text()))
    step = build(tree, environment)
    pins.ensure_mounted()  # a boot has one mount namespace; what is mounted in the one of run_in is gone with it
    said = run_in(tree, step)
    assert said == f"stasis: {name_of(node)}: tracked\n"
    forgive_earlier_writes(state, name_of(node))
    with mounted(node, tmp_path / "mnt") as directory:
        (directory / "file").write_bytes(os.urandom(MIB))
    assert lasting.resume(state) == [(name_of(node), lasting.TAKEN_UP)]
    with Tracker.open(node, state) as tracker:
        tracker.check()
        assert sum(length for _, length in tracker.changed_since(mark)) >= MIB


def run_in(tree: Path, step: str) -> str:
    """Run what an initramfs runs, with the kernel's file systems and a shell, and nothing else of this machine."""
    (tree / "step").write_text(step)
    for name in ("proc", "sys", "dev", "run", "bin", "lib", "lib64"):
        (tree / name).mkdir(exist_ok=True)
    if not (tree / "bin/sh").exists():
        subprocess.run(["sh", "-c", f"ROOT={tree}; {COPY} put_exec /bin/sh"], check=True)
    inside = " && ".join(f"mount --rbind /{name} {tree}/{name}" for name in ("proc", "sys", "dev", "run"))
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec",
               f"{inside} && exec env -i /usr/sbin/chroot {tree} /bin/sh /step"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def forgive_earlier_writes(state: Path, name: str) -> None:
    """A loop device's counter cannot be set back as a boot does."""
    path = DeviceFile(state, name).early
    noted = json.loads(path.read_text())
    assert noted["sight"]["written"] > 0
    noted["sight"]["written"] = 0
    path.write_text(json.dumps(noted))


def test_the_shell_scripts_are_well_formed() -> None:
    scripts = [path for name in ("initramfs-tools", "dracut", "systemd-shutdown")
               for path in (PACKAGING / name).rglob("*") if path.is_file()]
    assert len(scripts) == 5
    for path in scripts:
        assert os.access(path, os.X_OK), path
        tool("bash" if "bash" in path.read_text().splitlines()[0] else "sh", "-n", path)


def test_a_machine_that_tracks_nothing_gets_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    initramfs_tools(tree, environment)
    assert list(tree.iterdir()) == []
