# SPDX-License-Identifier: Apache-2.0
"""What the tests in the guest do to disks: partitions, file systems, mounts, and a load that proves what it wrote."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stasis.linux import blockdev

SECTOR = 512
MBR_ENTRY = struct.Struct("<B3sB3sII")  # status, first CHS, type, last CHS, first sector, sectors
MBR_TABLE = 446
MBR_SIGNATURE = b"\x55\xaa"
LINUX_TYPE = 0x83
MIB = 1 << 20


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed; its messages are in the failure otherwise."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} returned {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def take_step(steps: Sequence[Callable[[], None]]) -> None:
    """What this boot of a machine that is booted once for each step has to do. A step that fails is the last."""
    job, number = Path(os.environ["VMTEST_JOB"]), int(os.environ["VMTEST_BOOT"])
    again = job / "again"
    if number < len(steps):
        again.touch()
    try:
        steps[number - 1]()
    except BaseException:
        again.unlink(missing_ok=True)
        raise
    print(f"boot {number}: {steps[number - 1].__name__} PASSED", flush=True)


def wait_for(path: str) -> str:
    deadline = time.monotonic() + 60
    while not os.path.exists(path):
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)
    return path


@dataclass(frozen=True)
class Disk:
    """A virtio disk of the guest."""

    path: str

    @classmethod
    def by_serial(cls, serial: str) -> Disk:
        for directory in sorted(Path("/sys/block").glob("vd*")):
            if (directory / "serial").read_text().strip() == serial:
                return cls(f"/dev/{directory.name}")
        raise AssertionError(f"the guest has no disk {serial}")

    @property
    def size(self) -> int:
        with open(self.path, "rb") as device:
            return blockdev.size(device.fileno())

    def wipe(self) -> None:
        with open(self.path, "rb+", buffering=0) as device:
            blockdev.discard(device.fileno(), 0, self.size)
            device.write(bytes(MIB))  # whatever a discard leaves: no partition table, no file system
            os.fsync(device.fileno())
        reread(self.path)


def reread(node: str) -> None:
    """Have the kernel look at the partition table, which may have been written through another node."""
    with open(node, "rb") as device:
        blockdev.reread_partitions(device.fileno())


def partition(node: str, sizes: list[int]) -> list[str]:
    """Give a disk a DOS partition table, 1 MiB aligned; returns the partitions' nodes. Sizes in bytes."""
    table = bytearray(SECTOR)
    start = MIB
    for index, size in enumerate(sizes):
        entry = MBR_ENTRY.pack(0, bytes(3), LINUX_TYPE, bytes(3), start // SECTOR, size // SECTOR)
        table[MBR_TABLE + index * MBR_ENTRY.size : MBR_TABLE + (index + 1) * MBR_ENTRY.size] = entry
        start += size
    table[-2:] = MBR_SIGNATURE
    with open(node, "rb+", buffering=0) as device:
        device.write(table)
        os.fsync(device.fileno())
        blockdev.reread_partitions(device.fileno())
    return partitions(node, len(sizes))


def partitions(node: str, count: int) -> list[str]:
    infix = "p" if node[-1].isdigit() else ""
    return [wait_for(f"{node}{infix}{number}") for number in range(1, count + 1)]


@contextlib.contextmanager
def mounted(node: str, target: Path, options: str = "rw") -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    run("mount", "-o", options, node, target)
    try:
        yield target
    finally:
        run("umount", target)


class Load:
    """A process that appends numbered, synced records to directories until it is ended.

    Record N of a directory is a file whose every line is N. A line with N is printed once it is durable in all.
    """

    CODE = """
import os, sys
for number in range(10**9):
    for directory in sys.argv[1:]:
        with open(f"{directory}/{number % 50}", "w") as file:
            file.write(f"{number}\\n" * 2000)
            file.flush()
            os.fsync(file.fileno())
    print(number, flush=True)
"""

    def __init__(self, *directories: Path) -> None:
        self.directories = directories
        command = [sys.executable, "-c", self.CODE, *map(str, directories)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def wait_for_records(self, count: int) -> int:
        """Number of the last record that is durable after count more."""
        assert self.process.stdout is not None
        line = ""
        for _ in range(count):
            line = self.process.stdout.readline()
            assert line, "the load failed"
        return int(line)

    def stop(self) -> int:
        """Number of the last durable record."""
        self.process.terminate()
        rest, _ = self.process.communicate()
        lines = rest.split("\n")
        return int(lines[-2]) if len(lines) > 1 else -1

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def records(directory: Path) -> dict[int, set[str]]:
    """What is in each of the load's files: its different lines, without an unfinished last one."""
    files = [path for path in directory.iterdir() if path.name.isdecimal()]
    return {int(path.name): set(path.read_text().split("\n")[:-1]) for path in files}


def check_records(directory: Path, durable: int) -> None:
    """Every record up to durable is there, whole, or has been replaced by a later one of the same file."""
    found = records(directory)
    for number in range(max(0, durable - 49), durable + 1):
        lines = found.get(number % 50)
        # The one that was being written may be cut short or empty; it replaced a record that was durable.
        assert lines is not None, f"record {number} is lost"
        if lines:
            assert min(map(int, lines)) >= number, f"record {number} is older than it was: {lines}"
