# SPDX-License-Identifier: Apache-2.0
"""Shell scripts that do what users of dattobd's tools do today, with the commands and names that they use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.block import frontend
from tests.daemon.helpers import MIB, await_true
from tests.live.disks import mounted, tool
from tests.runner import Stasis

pytestmark = [
    pytest.mark.root,
    pytest.mark.tool("mkfs.ext4"),
    pytest.mark.skipif(os.geteuid() == 0 and not frontend.probe(), reason="this host has no way to make a node"),
]

CYCLE = """\
# A first copy with dd, then one update after the other, as dattobd's documentation teaches it.
set -eu
device=$1 minor=$2 copy=$3 cow=$4 mount=$5
dbdctl setup-snapshot "$device" "$cow.0" "$minor"
[ -b "/dev/datto$minor" ]
dd if="/dev/datto$minor" of="$copy" bs=1M conv=fsync status=none
dbdctl transition-to-incremental "$minor"
[ ! -e "/dev/datto$minor" ]
for round in 1 2; do
    head -c 200000 /dev/urandom > "$mount/file.$round"
    sync
    dbdctl transition-to-snapshot "$cow.$round" "$minor"
    echo later > "$mount/not yet"
    update-img "/dev/datto$minor" "$cow.$((round - 1))" "$copy"
    cmp "/dev/datto$minor" "$copy"
    rm "$cow.$((round - 1))"
    dbdctl transition-to-incremental "$minor"
done
dbdctl destroy "$minor"
[ ! -e "$cow.2" ]
"""

CREATE = """\
# A backup client's hook before a backup: a snapshot of what is mounted at $2, mounted in its turn. The first time it
# begins a series, later it goes on from incremental mode and says which file has the changes. The COW file lies on the
# very file system, as the module demands.
set -eu
id=$1 mountpoint=$2 notes=$3 first=$4 cow=$2/.cow-$1
device=$(df -P "$mountpoint" | awk 'NR == 2 { print $1 }')
kind=$(df -P -T "$mountpoint" | awk 'NR == 2 { print $2 }')
if [ -e "$notes/minor" ]; then
    minor=$(cat "$notes/minor") before=$(cat "$notes/cow")
    dbdctl transition-to-snapshot "$cow" "$minor"
    echo "CHANGES=$before"
else
    minor=$first
    while ! dbdctl setup-snapshot "$device" "$cow" "$minor" 2> "$notes/log"; do
        grep -q "Device or resource busy" "$notes/log"
        minor=$((minor + 1))
    done
    echo "$minor" > "$notes/minor"
fi
echo "$cow" > "$notes/cow"
options=ro
case $kind in
    ext*) options=$options,noload ;;
    xfs) options=$options,nouuid,norecovery ;;
esac
mkdir -p "$notes/$id"
if ! mount -t "$kind" -o "$options" "/dev/datto$minor" "$notes/$id"; then
    dbdctl destroy "$minor"
    exit 1
fi
echo "SNAPSHOT=$notes/$id"
"""

REMOVE = """\
# Its hook after the backup: the file system goes, the series goes on.
set -eu
id=$1 notes=$2 minor=$(cat "$2/minor")
if dbdctl transition-to-incremental "$minor" 2> /dev/null; then
    echo "was not mounted" >&2
    exit 1
fi
umount "$notes/$id"
rmdir "$notes/$id"
tries=0
until dbdctl transition-to-incremental "$minor"; do
    tries=$((tries + 1))
    [ "$tries" -lt 5 ]
    sleep 0.2
done
"""

CLEAN = """\
# What administrators run when something was left behind: every minor of the status file is destroyed.
set -eu
sed -n 's/^.*"minor": \\([0-9]*\\).*$/\\1/p' "$1" | while read -r minor; do
    if ! dbdctl destroy "$minor"; then
        echo "$minor stays" >&2
    fi
done
! dbdctl destroy 0 2> /dev/null
"""

RELOAD = """\
# A reload script of the boot: before the disk is back.
set -eu
dbdctl reload-incremental "$1" "$2" "$3"
"""


class Shell:
    """Runs scripts with the console scripts in their PATH."""

    def __init__(self, stasis: Stasis, directory: Path) -> None:
        self._directory = directory
        self._environment = {**stasis.environment, "PATH": f"{directory}:{os.environ['PATH']}", "LC_ALL": "C"}
        for name, module in (("dbdctl", "dbdctl"), ("update-img", "update_img")):
            path = directory / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -m stasis.cli.{module} "$@"\n')
            path.chmod(0o755)

    def run(self, script: str, *arguments: str | Path | int) -> str:
        done = subprocess.run(["sh", "-c", script, "script", *map(str, arguments)], env=self._environment,
                              cwd=self._directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (script.splitlines()[0], done.returncode, done.stdout, done.stderr)
        return done.stdout


def test_what_scripts_do_today(stasis: Stasis, short_dir: Path, minor: int) -> None:
    disk, shell = short_dir / "disk", Shell(stasis, short_dir)
    disk.write_bytes(bytes(24 * MIB))
    node = stasis.json("device", "attach", disk, "--kernel")["node"]
    tool("mkfs.ext4", "-q", "-F", node)
    with mounted(node, short_dir / "mnt") as target:
        shell.run(CYCLE, node, minor, short_dir / "copy", short_dir / "cow", target)
        _hooks(shell, target, short_dir / "notes", minor)
        shell.run(CLEAN, stasis.run_dir / "datto-info")
        assert stasis.json("datto", "list") == []
        shell.run("dbdctl setup-snapshot $1 again $2 && dbdctl transition-to-incremental $2", node, minor)
    await_true(lambda: stasis.run("device", "detach", "disk").returncode == 0)  # others may have copies of our mounts
    stasis("datto", "list")
    shell.run("dbdctl destroy $1", minor)
    shell.run(RELOAD, disk, "again", minor)
    stasis("device", "attach", disk)
    assert stasis.json("datto", "show", str(minor))["state_name"] == "active incremental"


def _hooks(shell: Shell, target: Path, notes: Path, minor: int) -> None:
    notes.mkdir()
    first = ""
    for number in range(2):
        (target / "number").write_text(str(number))
        os.sync()
        said = shell.run(CREATE, f"backup{number}", target, notes, minor).splitlines()
        assert said[-1] == f"SNAPSHOT={notes}/backup{number}"
        assert said[:-1] == ([f"CHANGES={first}"] if number else [])
        (target / "number").write_text("later")
        assert (notes / f"backup{number}" / "number").read_text() == str(number)
        shell.run(REMOVE, f"backup{number}", notes)
        first = first or (notes / "cow").read_text().strip()
    await_true(lambda: not os.path.lexists(f"/dev/datto{minor}"))
