# SPDX-License-Identifier: Apache-2.0
"""Backups: against restic and borg at their defaults, and against qemu-img and cp where nothing is encrypted."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from archivers import Archiver, Borg, Restic, StasisArchiver
from groups import Bench, alternate, group
from lab import MIB, Lab, peak_memory
from ours import Stasis
from report import Row, ratio_row, value_row

from stasis.nbd.client import Client

PIECE = 64 << 10
WORDS = 5000
CHANGED = 64 * MIB
MEMORY_LIMIT = 250 * MIB
PEERS = "the faster of restic and borg"


def mixed_image(lab: Lab, name: str, size: int) -> Path:
    """An image that is half random, a quarter text and a quarter zeroes, in the page cache."""
    path = lab.path(name)
    draw = random.Random(1)
    words = [bytes(draw.choices(b"abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(WORDS)]
    with open(path, "wb") as file:
        for _ in range(size // 2 // MIB):
            file.write(os.urandom(MIB))
        for _ in range(size // 4 // MIB):
            file.write(b" ".join(draw.choices(words, k=MIB // 4))[:MIB].ljust(MIB))
        for _ in range(size // 4 // MIB):
            file.write(bytes(MIB))
        os.fsync(file.fileno())
    return path


def _seconds(job: Callable[[], object]) -> float:
    started = time.monotonic()
    job()
    return time.monotonic() - started


def _against_faster(
    name: str, title: str, figures: Mapping[str, Sequence[float]], limit: float, peers: Sequence[str]
) -> Row:
    """Our rate by that of the peer which was faster in the same round."""
    best = [max(rates) for rates in zip(*(figures[peer] for peer in peers), strict=True)]
    return ratio_row(name, title, figures["stasis"], best, limit, ("stasis", PEERS), "bytes/s")


class _Jobs:
    """First full, verify and restore of one image by each program; a repository per round."""

    def __init__(self, bench: Bench, lab: Lab) -> None:
        self.image = mixed_image(lab, "mixed.img", 4 * bench.image_size)
        self.size = self.image.stat().st_size
        self.lab = lab
        self._makers: dict[str, Callable[[int], Archiver]] = {
            "stasis": partial(StasisArchiver, lab, stasis=Stasis(lab, "plain")),
            "restic": partial(Restic, lab),
            "borg": partial(Borg, lab),
        }
        self._filled: dict[str, Archiver] = {}

    @property
    def names(self) -> Sequence[str]:
        """The programs that are installed."""
        return [name for name in self._makers if name == "stasis" or shutil.which(name)]

    def full(self, name: str, number: int) -> float:
        """Bytes of the image per second of a first full backup."""
        if previous := self._filled.pop(name, None):
            shutil.rmtree(previous.repository)
        archiver = self._filled[name] = self._makers[name](number)
        return self.size / _seconds(lambda: (archiver.create(self.image), os.sync()))

    def verify(self, name: str, number: int) -> float:
        """Bytes of the image per second of a check of all data."""
        return self.size / _seconds(self._filled[name].verify)

    def restore(self, name: str, number: int) -> float:
        """Bytes of the image per second of a restore, durable."""
        target = self.lab.directory / "restored"
        target.mkdir()
        try:
            return self.size / _seconds(lambda: (self._filled[name].restore(self.image, target), os.sync()))
        finally:
            shutil.rmtree(target)


@group("backup-full", "backup-verify", "backup-restore", tools=("restic", "borg"), suite="backup")
def encrypted(bench: Bench) -> list[Row]:
    """Encrypted and compressed, each program with its defaults."""
    with bench.lab.scope() as lab:
        jobs = _Jobs(bench, lab)
        kinds = {"full": jobs.full, "verify": jobs.verify, "restore": jobs.restore}
        figures = {
            kind: alternate(bench, {name: partial(job, name) for name in jobs.names}) for kind, job in kinds.items()
        }
        peers = [name for name in jobs.names if name != "stasis"]
    wanted = {"full": ("first full backup", 2.0), "verify": ("verify all data", 1.5), "restore": ("restore", 1.5)}
    return [
        _against_faster(f"backup-{kind}", f"{title}, encrypted and compressed / {PEERS}", figures[kind], limit, peers)
        for kind, (title, limit) in wanted.items()
    ]


@group("backup-full-plain", "backup-restore-plain", tools=("qemu-img", "cp"), suite="backup")
def plain(bench: Bench) -> list[Row]:
    """Neither encrypted nor compressed, against programs that just copy; all end with durable data."""
    with bench.lab.scope() as lab:
        image = mixed_image(lab, "mixed.img", 4 * bench.image_size)
        size = image.stat().st_size
        copy = lab.path("copy.img")
        filled: list[StasisArchiver] = []

        def full(number: int) -> float:
            if filled:
                shutil.rmtree(filled.pop().repository)
            filled.append(StasisArchiver(lab, number, Stasis(lab, "plain"), plain=True))
            return size / _seconds(lambda: (filled[0].create(image), os.sync()))

        def restore(number: int) -> float:
            target = lab.directory / "restored"
            target.mkdir()
            try:
                return size / _seconds(lambda: (filled[0].restore(image, target), os.sync()))
            finally:
                shutil.rmtree(target)

        def copied(*words: str | Path) -> float:
            copy.unlink(missing_ok=True)
            return size / _seconds(lambda: (lab.run([*words, image, copy]), os.sync()))

        made = alternate(bench, {"stasis": full, "qemu-img": lambda _: copied("qemu-img", "convert", "-O", "raw")})
        back = alternate(bench, {"stasis": restore, "cp": lambda _: copied("cp", "--reflink=never")})
    title = "neither encrypted nor compressed"
    return [
        ratio_row("backup-full-plain", f"first full backup, {title} / qemu-img convert", made["stasis"],
                  made["qemu-img"], 0.8, ("stasis", "qemu-img"), "bytes/s"),
        ratio_row("backup-restore-plain", f"restore, {title} / cp", back["stasis"], back["cp"], 0.7,
                  ("stasis", "cp"), "bytes/s"),
    ]  # fmt: skip


@contextmanager
def _served(lab: Lab, image: Path) -> Iterator[tuple[Stasis, Client]]:
    """An image served by a daemon, and a connection to write to it."""
    stasis = Stasis(lab, "served").start()
    with Client.connect(stasis.attach(image, "disk", "--buffered")) as client:
        yield stasis, client


def _change(size: int, amount: int, seed: int) -> list[tuple[int, bytes]]:
    """New contents for `amount` bytes of pieces at random."""
    places = random.Random(seed).sample(range(size // PIECE), amount // PIECE)
    return [(place * PIECE, os.urandom(PIECE)) for place in sorted(places)]


@group("backup-incremental", tools=("restic", "borg"), suite="backup")
def incremental(bench: Bench) -> list[Row]:
    """One percent changed at random, 64 KiB at a time; the peers get the changed image file."""
    with bench.lab.scope() as lab:
        image = mixed_image(lab, "mixed.img", 4 * bench.image_size)
        size = image.stat().st_size
        with _served(lab, image) as (stasis, client):
            ours = StasisArchiver(lab, 0, stasis)
            peers: dict[str, Archiver] = {"restic": Restic(lab, 0), "borg": Borg(lab, 0)}
            ours.create("disk")
            for peer in peers.values():
                peer.create(image)

            def round_(number: int) -> float:
                # All programs of a round back up the same changes.
                client.write_many(_change(size, size // 100, number))
                client.flush()
                return size / _seconds(lambda: ours.create("disk"))

            figures = {name: [] for name in ("stasis", *peers)}  # type: dict[str, list[float]]
            for number in range(bench.rounds):
                os.sync()
                figures["stasis"].append(round_(number))
                for name, peer in peers.items():
                    os.sync()
                    figures[name].append(size / _seconds(partial(peer.create, image)))
    title = f"incremental backup, 1 % changed at random, 64 KiB at a time / {PEERS} on the changed image"
    return [_against_faster("backup-incremental", title, figures, 20.0, list(peers))]


@group("backup-growth-4", "backup-growth-16", suite="backup")
def growth(bench: Bench) -> list[Row]:
    """The time of an incremental of the same 64 MiB, on devices of 1, 4 and 16 GiB."""
    sizes = [bench.image_size * factor for factor in (1, 4, 16)]
    times: dict[int, list[float]] = {size: [] for size in sizes}
    with bench.lab.scope() as lab:
        stasis = Stasis(lab, "served").start()
        clients, ours = {}, StasisArchiver(lab, 0, stasis)
        for size in sizes:
            path = lab.path(f"{size}.img")
            with open(path, "wb") as file:
                file.truncate(size)
            clients[size] = Client.connect(stasis.attach(path, f"disk{size}", "--buffered"))
            ours.create(f"disk{size}")
        for number in range(bench.rounds):
            for size in sizes if number % 2 == 0 else sizes[::-1]:
                clients[size].write_many(_change(bench.image_size, CHANGED, number))
                os.sync()
                times[size].append(_seconds(lambda size=size: ours.create(f"disk{size}")))
        for client in clients.values():
            client.close()
    smallest = times[sizes[0]]
    return [
        value_row(f"backup-growth-{factor}", f"incremental of the same 64 MiB, {factor} times the device / once",
                  [long / short for long, short in zip(times[size], smallest, strict=True)], 1.3, "x")
        for factor, size in zip((4, 16), sizes[1:], strict=True)
    ]  # fmt: skip


@group("backup-memory", suite="backup")
def memory(bench: Bench) -> list[Row]:
    """Peak resident memory of each job, the largest one counts."""
    with bench.lab.scope() as lab:
        image = mixed_image(lab, "mixed.img", 4 * bench.image_size)
        ours = StasisArchiver(lab, 0, Stasis(lab, "plain"))
        target = lab.path("restored.img")
        jobs = {
            "create": ("backup", "create", image),
            "again": ("backup", "create", image),
            "restore": ("backup", "restore", "latest", target),
            "check": ("backup", "check", "--read-data"),
            "verify": ("backup", "verify", "latest"),
        }
        peaks = {name: peak_memory(ours.command(*words)) for name, words in jobs.items()}
    note = ", ".join(f"{name} {peak // MIB} MiB" for name, peak in peaks.items())
    highest = max(peaks.values()) / MEMORY_LIMIT
    return [value_row("backup-memory", "peak memory of any job / 250 MiB", [highest], 1.0, "x", note=note)]
