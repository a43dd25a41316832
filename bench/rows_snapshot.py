# SPDX-License-Identifier: Apache-2.0
"""Writes while a snapshot is held, page-cached: against QEMU's copy-before-write and against our own path
without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fio
from fio import CHUNK, Load
from groups import Bench, alternate, group
from lab import MIB, Lab
from ours import Stasis
from peers import QemuFleecing
from report import Row, ratio_row

FLEECING = "qemu-storage-daemon copy-before-write"
NAMES = ("held", "no snapshot")


@contextmanager
def held(lab: Lab, stasis: Stasis, storage: Path) -> Iterator[str]:
    """A snapshot of the device ``disk`` for the duration; it must be sound at the end."""
    uuid = stasis.take(["disk"], storage)
    try:
        yield uuid
        stasis.show(uuid)
    finally:
        stasis.destroy(uuid)


def storage_directory(lab: Lab) -> Path:
    """Where snapshots keep old contents: a directory beside the origin, like the peer's qcow2 file."""
    path = lab.directory / "storage"
    path.mkdir(exist_ok=True)
    return path


def first_touches(bench: Bench, lab: Lab) -> Load:
    """4 KiB writes in random order, one in each 64 KiB chunk of the device."""
    trace = fio.first_touch_trace(lab.path("trace"), bench.image_size, bench.image_size // CHUNK, seed=1)
    return Load("write", fio.BLOCK, bench.image_size, trace=trace)


def one_pass(bench: Bench, block_size: int) -> Load:
    """Sequential writes over the whole device, once."""
    return Load("write", block_size, bench.image_size)


@group("cow-random-qemu", "cow-sequential-qemu", tools=("fio", "qemu-storage-daemon", "qemu-img"))
def cow_against_qemu(bench: Bench) -> list[Row]:
    """Every chunk still to copy: a new snapshot, and a new fleecing daemon, in each round."""
    with bench.lab.scope() as lab:
        image = lab.data_file("stasis.img", bench.image_size)
        peer_image = lab.data_file("qemu.img", bench.image_size)
        stasis = Stasis(lab).start()
        uri = stasis.attach(image, "disk", "--buffered")
        loads = {"random": first_touches(bench, lab), "sequential": one_pass(bench, MIB)}

        def ours(load: Load, number: int) -> float:
            with held(lab, stasis, storage_directory(lab)):
                return fio.run(lab, uri, load).bandwidth

        def peers(load: Load, number: int) -> float:
            with lab.scope() as inner:
                fleecing = QemuFleecing(inner, peer_image, bench.image_size)
                fleecing.take()
                return fio.run(inner, fleecing.live, load).bandwidth

        figures = {
            kind: alternate(bench, {"stasis": partial(ours, load), FLEECING: partial(peers, load)})
            for kind, load in loads.items()
        }
    titles = {"random": "4 KiB random write", "sequential": "1 MiB sequential write"}
    limits = {"random": 2.0, "sequential": 1.5}
    return [
        ratio_row(
            f"cow-{kind}-qemu",
            f"{titles[kind]}, snapshot held, every chunk still to copy / {FLEECING}",
            found["stasis"],
            found[FLEECING],
            limits[kind],
            ("stasis", FLEECING),
            "bytes/s",
        )
        for kind, found in figures.items()
    ]


FIRST_LIMITS = {"first-4k-random": 0.5, "first-64k-sequential": 0.5, "first-1m-sequential": 0.25}


@group(*FIRST_LIMITS, tools=("fio",))
def first_writes(bench: Bench) -> list[Row]:
    """What a held snapshot costs the first write into each place, against the same writes without one."""
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        uri = stasis.attach(lab.data_file("stasis.img", bench.image_size), "disk", "--buffered")
        loads = dict(
            zip(FIRST_LIMITS, (first_touches(bench, lab), one_pass(bench, CHUNK), one_pass(bench, MIB)), strict=True)
        )

        def with_snapshot(load: Load, number: int) -> float:
            with held(lab, stasis, storage_directory(lab)):
                return fio.run(lab, uri, load).bandwidth

        def without(load: Load, number: int) -> float:
            return fio.run(lab, uri, load).bandwidth

        figures = {
            name: alternate(
                bench,
                {
                    NAMES[0]: partial(with_snapshot, load),
                    NAMES[1]: partial(without, load),
                },
            )
            for name, load in loads.items()
        }
    return [
        ratio_row(
            name,
            f"first write with a snapshot held / without, page-cached, {name.removeprefix('first-').replace('-', ' ')}",
            found[NAMES[0]],
            found[NAMES[1]],
            FIRST_LIMITS[name],
            NAMES,
            "bytes/s",
        )
        for name, found in figures.items()
    ]


@group("copied-random", tools=("fio",))
def already_copied(bench: Bench) -> list[Row]:
    """Random writes into chunks that the snapshot already has, against the same device without a snapshot."""
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        uri = stasis.attach(lab.data_file("stasis.img", bench.image_size), "disk", "--buffered")
        load = Load("randwrite", fio.BLOCK, bench.image_size, bench.seconds)

        def copied(number: int) -> float:
            with held(lab, stasis, storage_directory(lab)):
                fio.run(lab, uri, one_pass(bench, MIB))
                return fio.run(lab, uri, load).iops

        figures = alternate(bench, {NAMES[0]: copied, NAMES[1]: lambda _: fio.run(lab, uri, load).iops})
    title = "random write, snapshot held, chunks already copied / without a snapshot"
    return [ratio_row("copied-random", title, figures[NAMES[0]], figures[NAMES[1]], 0.95, NAMES, "operations/s")]
