# SPDX-License-Identifier: Apache-2.0
"""Backups of live devices: how long a file system is frozen, and what copying costs next to reading alone."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from groups import Bench, alternate, group
from lab import MIB, Lab
from report import Row, ratio_row, value_row

from stasis.backup.repo import Repository, Secrets
from stasis.daemon.backups import BackupJob, back_up
from stasis.linux.iobuffer import IoBuffer
from stasis.live import tracking
from stasis.live.direct import DirectReader

BUSY_SIZE = 2 << 30
IDLE_SIZE = 1 << 30
INCREMENTAL_SIZE = 8 << 30
"""Of a small device, what any backup costs (opening, locks, two waits for the kernel's programs) would be measured."""
BLOCK = 64 << 10
CHANGED_SHARE = 0.01
FREEZE_MEDIAN, FREEZE_LONGEST = 60.0, 200.0
COPY_RATE = 0.9
READ_TIMES = 3.0


class _Place:
    """A tracked loop device, a repository without compression, and the state of an own stasis."""

    def __init__(self, lab: Lab, node: Path, folder: Path) -> None:
        self.node, self.folder = node, folder
        self._lab = lab
        self.renew()
        tracking.start(str(node), folder / "state").close()
        lab.on_exit(lambda: tracking.stop(str(node), folder / "state"))

    def renew(self) -> None:
        """An empty repository in place of what there was."""
        self._lab.run(["rm", "-rf", self.folder / "repo"])
        Repository.init(str(self.folder / "repo"), secret=None, compression="none").close()

    def back_up(self) -> dict[str, int]:
        """The statistics of one more backup."""
        with Repository.open(str(self.folder / "repo"), Secrets.none()) as repository:
            job = BackupJob([str(self.node)], run_dir=self.folder / "run", state_dir=self.folder / "state")
            return dict(back_up(job, repository).backups[0].statistics)


@contextmanager
def _place(bench: Bench, size: int, *, sparse: bool = False) -> Iterator[tuple[Lab, _Place]]:
    with bench.lab.scope() as lab:
        folder = tempfile.TemporaryDirectory(prefix="live-", dir=lab.directory)
        lab.on_exit(folder.cleanup)
        image = lab.path("live.img") if sparse else lab.data_file("live.img", size)
        if sparse:
            with open(image, "wb") as file:
                file.truncate(size)
        node = Path(lab.run(["losetup", "--find", "--show", "--direct-io=on", image]).strip())
        lab.on_exit(lambda: lab.run(["losetup", "--detach", node]))
        yield lab, _Place(lab, node, Path(folder.name))


@group("live-freeze", "live-freeze-longest", tools=("fio", "losetup", "mkfs.ext4"), needs_root=True, suite="live")
def live_freeze(bench: Bench) -> list[Row]:
    """An ext4 of which 2 GiB are written at 20 MB/s, 4 KiB at random places, while it is backed up again and again."""
    values: list[float] = []
    with _place(bench, BUSY_SIZE + (512 << 20)) as (lab, place):
        directory = place.folder / "mounted"
        directory.mkdir()
        lab.run(["mkfs.ext4", "-q", "-F", place.node])
        lab.run(["mount", place.node, directory])
        lab.on_exit(lambda: lab.run(["umount", directory]))
        lab.run([*_fio(directory), "--bs=1m", "--rw=write"])
        writer = lab.start([*_fio(directory), "--bs=4k", "--rw=randwrite", "--rate=20m", "--time_based",
                            "--runtime=3600", "--direct=1", "--ioengine=libaio", "--iodepth=8"], server=False)
        for _ in range(bench.rounds):
            values.append(float(place.back_up()["freeze_milliseconds"]))
        writer.terminate()
        writer.wait()
    title = "freeze under a 20 MB/s random writer on 2 GiB"
    return [value_row("live-freeze", title, values, FREEZE_MEDIAN, "ms"),
            value_row("live-freeze-longest", f"{title}, the longest", [max(values)], FREEZE_LONGEST, "ms")]


def _fio(directory: Path) -> list[str]:
    return ["fio", "--name=live", f"--filename={directory}/data", f"--size={BUSY_SIZE}", "--eta=never"]


@group("live-full-copy", tools=("dd", "losetup"), needs_root=True, suite="live")
def live_full_copy(bench: Bench) -> list[Row]:
    """The first backup of an idle device against dd with direct reads to a file beside the repository."""
    with _place(bench, IDLE_SIZE) as (lab, place):
        def stasis(_: int) -> float:
            place.renew()
            started = time.monotonic()
            place.back_up()
            return IDLE_SIZE / MIB / (time.monotonic() - started)

        def dd(_: int) -> float:
            started = time.monotonic()
            lab.run(["dd", f"if={place.node}", f"of={place.folder}/copy.img", "bs=1M", "iflag=direct", "conv=fsync"])
            return IDLE_SIZE / MIB / (time.monotonic() - started)

        figures = alternate(bench, {"stasis": stasis, "dd": dd})
    return [ratio_row("live-full-copy", "first backup of an idle device / dd with direct reads", figures["stasis"],
                      figures["dd"], COPY_RATE, ("stasis", "dd"), "MiB/s")]


@group("live-incremental", tools=("losetup",), needs_root=True, suite="live")
def live_incremental(bench: Bench) -> list[Row]:
    """A backup after 1 % of a device changed, against reading just these blocks; as a note, of a device of 1 GiB.

    The reading is as fast as we can: 32 direct reads at a time by io_uring, in this process, as the backup is.
    """
    values = _incrementals(bench, INCREMENTAL_SIZE, bench.rounds)
    small = sorted(_incrementals(bench, IDLE_SIZE, bench.rounds))
    title = f"backup after 1 % of {INCREMENTAL_SIZE >> 30} GiB changed / reading these blocks"
    note = f"of {IDLE_SIZE >> 30} GiB {small[len(small) // 2]:.1f} times"
    return [value_row("live-incremental", title, values, READ_TIMES, "times", note)]


def _incrementals(bench: Bench, size: int, rounds: int) -> list[float]:
    values, draw = [], random.Random(1)
    with _place(bench, size, sparse=True) as (lab, place):
        place.back_up()
        for _ in range(rounds):
            blocks = sorted(draw.sample(range(size // BLOCK), int(size // BLOCK * CHANGED_SHARE)))
            with open(place.node, "r+b", buffering=0) as device:
                for block in blocks:
                    device.seek(block * BLOCK)
                    device.write(draw.randbytes(BLOCK))
            lab.run(["sync"])
            reading = _read(place.node, blocks)
            started = time.monotonic()
            place.back_up()
            values.append((time.monotonic() - started) / reading)
    return values


def _read(node: Path, blocks: list[int]) -> float:
    """Seconds that it takes."""
    reader = DirectReader(str(node))
    with IoBuffer(len(blocks) * BLOCK) as room:
        started = time.monotonic()
        reader.read_into([(block * BLOCK, BLOCK) for block in blocks], room.view)
        elapsed = time.monotonic() - started
    reader.close()
    return elapsed
