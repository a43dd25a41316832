# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the main job of stasis, for real, on two ext4 disk images, without root.

Two disks are served and written without pause. They are snapshotted at one instant, copied whole, written on,
snapshotted again, and only the changes are copied. Each copy is compared byte for byte with its snapshot, read
over NBD by other code than the copy's, and its file system is checked. Everything goes through the `stasis`
command as a user would type it; each command is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from stasis.units import format_size, parse_size
from tools.demo_load import Checks, Load, SlottedFile

DISKS = ("disk-a", "disk-b")
PAYLOAD_SHARE, LOAD_SHARE = 4, 8
"""A quarter of a disk is filled with files that stay, an eighth is the file that is overwritten all the time."""


class DemoError(Exception):
    """Something did not come out as promised."""


class Row(NamedTuple):
    """One line of the table at the end."""

    what: str
    amount: str
    speed: str


class Demo:
    """The story, its directory, and what it has measured."""

    def __init__(self, directory: Path, size: int, seconds: float) -> None:
        self.directory = directory
        self.size = size
        self.seconds = seconds
        self.rows: list[Row] = []
        self.environment = {
            **os.environ,
            "STASIS_RUN_DIR": str(directory / "run"),
            "STASIS_STATE_DIR": str(directory / "state"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def tell(self) -> None:
        """Run the demo from start to end; raises DemoError where a check fails."""
        step("Making two disk images with an ext4 file system each")
        slots = {name: self.make_disk(name) for name in DISKS}
        step("Serving them")
        uris = {name: self.stasis("device", "attach", f"{name}.img", "--name", name) for name in DISKS}
        step("Writing to both without pause from here on: a number to disk-a, then the same to disk-b, and more")
        with Load(uris, slots) as load:
            checks = Checks(slots)
            self.note_load(load, "write to both disks")
            first = self.take()
            self.copy_and_check(first, "copy whole", checks)
            self.destroy(first)
            self.note_load(load, "write to both disks")
            second = self.take()
            self.copy_and_check(second, "copy changes", checks, since=first)
            self.destroy(second)
        for name in DISKS:
            self.stasis("device", "detach", name)
        self.print_table()

    def make_disk(self, name: str) -> SlottedFile:
        """A disk image with files in an ext4 file system; returns where the file to overwrite lies on it."""
        tree = self.directory / "tree"
        tree.mkdir()
        fill(tree / "photographs", self.size // PAYLOAD_SHARE)
        fill(tree / "database", self.size // LOAD_SHARE)
        image = self.directory / f"{name}.img"
        self.run("mkfs.ext4", "-q", "-b", "4096", "-d", tree.name, image.name, f"{self.size >> 10}k")
        shutil.rmtree(tree)
        return SlottedFile(self.physical_blocks(image, "/database"), 4096)

    def physical_blocks(self, image: Path, path: str) -> list[int]:
        """Numbers of the file system's blocks that hold the file's data, in order."""
        listing = self.run("debugfs", "-R", f"stat {path}", image.name)
        blocks: list[int] = []
        for first, last in re.findall(r"\(\d+(?:-\d+)?\):(\d+)(?:-(\d+))?", listing.partition("EXTENTS:")[2]):
            blocks.extend(range(int(first), int(last or first) + 1))
        if len(blocks) != self.size // LOAD_SHARE // 4096:
            raise DemoError(f"debugfs names {len(blocks)} blocks of {path}, which is not its size")
        return blocks

    def take(self) -> dict[str, Any]:
        """Snapshot both disks at one instant; returns what `snapshot show --json` says."""
        step("Taking a snapshot of both at one instant")
        (self.directory / "storage").mkdir(exist_ok=True)
        identity = self.stasis("snapshot", "create", "--storage", "storage", *DISKS, "--take")
        shown = self.show(identity)
        self.rows.append(Row("snapshot of both disks", "", f"writes held for {shown['hold_ns'] / 1e6:.1f} ms"))
        return shown

    def show(self, identity: str) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.stasis("snapshot", "show", identity, "--json", quiet=True))
        return shown

    def destroy(self, snapshot: dict[str, Any]) -> None:
        """End a snapshot and note what it had to keep of what was overwritten meanwhile."""
        filled = self.show(snapshot["id"])["storage"]["filled"]
        self.rows.append(Row("kept for the snapshot", format_size(filled), "old contents, copied on write"))
        self.stasis("snapshot", "destroy", snapshot["id"])

    def copy_and_check(
        self, snapshot: dict[str, Any], what: str, checks: Checks, since: dict[str, Any] | None = None
    ) -> None:
        """Copy both images, whole or what changed since another snapshot, and check the copies."""
        step(f"{what.capitalize()} of both images, while the disks are written")
        for device in snapshot["devices"]:
            self.copy(snapshot["id"], device["name"], what, since)
        step("Checking the copies: byte for byte against the snapshot, then the file systems, then the numbers")
        numbers = []
        for device in snapshot["devices"]:
            copy = self.directory / f"copy-of-{device['name']}.img"
            checked = checks.same_bytes(device["uri"], copy)
            self.run("e2fsck", "-f", "-n", copy.name)
            numbers.append(checks.sequence_number(device["name"], copy))
            print(f"  {copy.name}: {format_size(checked)} equal, e2fsck clean, last number {numbers[-1]}")
        if not 0 <= numbers[0] - numbers[1] <= 1:
            raise DemoError(f"the snapshot is not one instant: disk-a has {numbers[0]}, disk-b {numbers[1]}")

    def copy(self, identity: str, name: str, what: str, since: dict[str, Any] | None) -> None:
        """`stasis snapshot copy` of one image, with its row in the table."""
        command = ["snapshot", "copy", identity, name, f"copy-of-{name}.img"]
        if since is not None:
            number = next(device["change_number"] for device in since["devices"] if device["name"] == name)
            command += ["--since", str(number)]
        summary = json.loads(self.stasis(*command, "--json").splitlines()[-1])
        copied, seconds = summary["bytes_copied"], summary["seconds"]
        rate = f"{format_size(int(copied / seconds))}/s, {seconds:.1f} s"
        self.rows.append(Row(f"{what}, {name}", format_size(copied), rate))

    def note_load(self, load: Load, what: str) -> None:
        """Let the disks be written for a while and note how fast that went."""
        before, started = load.written, time.monotonic()
        time.sleep(self.seconds)
        elapsed = time.monotonic() - started
        written = load.written - before
        rate = f"{format_size(int(written / elapsed))}/s in 4 KiB writes"
        self.rows.append(Row(what, format_size(written), rate))

    def stasis(self, *arguments: str, quiet: bool = False) -> str:
        """A `stasis` command; its standard output. What it says on standard error goes to the terminal."""
        if not quiet:
            print("  $ stasis " + " ".join(arguments), flush=True)
        command = [sys.executable, "-m", "stasis", *arguments]
        result = subprocess.run(
            command, env=self.environment, cwd=self.directory, stdout=subprocess.PIPE, text=True
        )
        if result.returncode:
            raise DemoError(f"stasis {' '.join(arguments)} returned {result.returncode}")
        if not quiet and "--json" not in arguments:
            print("".join(f"  {line}\n" for line in result.stdout.splitlines()), end="")
        return result.stdout.strip()

    def run(self, *command: str) -> str:
        """Another program, whose output is shown only where it fails."""
        try:
            result = subprocess.run(
                command, env=self.environment, cwd=self.directory, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise DemoError(f"{command[0]} is not installed; as root: apt-get install e2fsprogs") from None
        if result.returncode:
            raise DemoError(f"{' '.join(command)} returned {result.returncode}:\n{result.stdout}{result.stderr}")
        return result.stdout

    def print_table(self) -> None:
        rows = [Row("what", "amount", "speed"), *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        print()
        for row in rows:
            print(f"  {row.what:<{widths[0]}}  {row.amount:>{widths[1]}}  {row.speed}")
        print("\nAll copies are right: equal byte for byte, clean file systems, both disks at one instant.")

    def show_logs(self) -> None:
        """The last lines of what daemon and workers said, before the directory is removed."""
        for log in sorted((self.directory / "run").rglob("*.log")):
            for line in log.read_text(errors="replace").splitlines()[-10:]:
                print(f"{log.name}: {line}", file=sys.stderr)

    def stop_daemon(self) -> None:
        """End the daemon that the first command started, if it did."""
        if (self.directory / "run" / "control.sock").exists():
            self.stasis("daemon", "stop", "--force", quiet=True)


def step(text: str) -> None:
    print(f"\n{text}", flush=True)


def fill(path: Path, size: int) -> None:
    """A file of random bytes: mkfs would leave a hole for zeroes."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def require_space(directory: Path, size: int) -> None:
    """Two disks, two copies, the difference storage. Raises DemoError."""
    needed, free = size * 2, shutil.disk_usage(directory).free
    if free < needed:
        raise DemoError(
            f"{directory} has {format_size(free)} free and the demo needs {format_size(needed)}; "
            "set TMPDIR to a larger place, or pass --size"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Snapshot and copy two ext4 disk images under load.")
    parser.add_argument("--size", type=parse_size, default=parse_size("512M"), help="size of each disk")
    parser.add_argument("--seconds", type=float, default=3, help="how long to write before each snapshot")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stasis-demo-") as name:
        demo = Demo(Path(name), options.size, options.seconds)
        try:
            require_space(demo.directory, options.size)
            demo.tell()
        except (DemoError, OSError) as error:
            print(f"demo: {error}", file=sys.stderr)
            demo.show_logs()
            return 1
        finally:
            demo.stop_daemon()
    return 0


if __name__ == "__main__":
    sys.exit(main())
