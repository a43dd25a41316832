# SPDX-License-Identifier: Apache-2.0
"""Reading the snapshot image: at random while the origin is written, and whole."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import fio
from fio import Load
from groups import Bench, alternate, group
from lab import Lab
from ours import Stasis
from peers import QemuFleecing, start_nbdkit
from report import Row, ratio_row
from rows_snapshot import held, storage_directory

ACCESS = "qemu-storage-daemon snapshot-access"
# The writer is held to the same rate for both servers: a server that accepts more writes than the other would
# otherwise be punished in its reads for it.
WRITER_IOPS = 4000


@group("image-randread-qemu", tools=("fio", "qemu-storage-daemon", "qemu-img"))
def image_randread(bench: Bench) -> list[Row]:
    """Random reads of the image, 4 KiB at depth 16, while the origin takes 4 KiB random writes."""
    with bench.lab.scope() as lab:
        image = lab.data_file("stasis.img", bench.image_size)
        peer_image = lab.data_file("qemu.img", bench.image_size)
        stasis = Stasis(lab).start()
        uri = stasis.attach(image, "disk", "--buffered")
        read = Load("randread", fio.BLOCK, bench.image_size, bench.seconds)
        write = Load("randwrite", fio.BLOCK, bench.image_size, bench.seconds + 30, rate_iops=WRITER_IOPS)

        def ours(number: int) -> float:
            with held(lab, stasis, storage_directory(lab)) as uuid:
                return _read_under_writes(lab, uri, write, stasis.image_uri(uuid), read)

        def peers(number: int) -> float:
            with lab.scope() as inner:
                fleecing = QemuFleecing(inner, peer_image, bench.image_size)
                fleecing.take()
                return _read_under_writes(inner, fleecing.live, write, fleecing.snapshot, read)

        figures = alternate(bench, {"stasis": ours, ACCESS: peers})
    title = f"image random read while the origin is written / {ACCESS}"
    names = ("stasis", ACCESS)
    return [ratio_row("image-randread-qemu", title, figures["stasis"], figures[ACCESS], 1.2, names, "operations/s")]


def _read_under_writes(lab: Lab, live: str, write: Load, snapshot: str, read: Load) -> float:
    with lab.scope() as inner:
        fio.background(inner, live, write)
        time.sleep(0.5)
        return fio.run(inner, snapshot, read).iops


@group("image-to-null", tools=("nbdcopy", "nbdkit"))
def image_to_null(bench: Bench) -> list[Row]:
    """nbdcopy of the whole image, half of it from difference storage, against nbdkit serving the plain
    file."""
    with bench.lab.scope() as lab:
        image, plain = (lab.data_file(name, bench.image_size) for name in ("stasis.img", "plain.img"))
        stasis = Stasis(lab).start()
        uri = stasis.attach(image, "disk", "--buffered")
        with held(lab, stasis, storage_directory(lab)) as uuid:
            fio.run(lab, uri, Load("write", 1 << 20, bench.image_size // 2))
            sources = {"stasis": stasis.image_uri(uuid), "nbdkit": start_nbdkit(lab, plain)}
            figures = alternate(
                bench, {name: partial(_copy_rate, lab, source, bench.image_size) for name, source in sources.items()}
            )
    title = "whole image to null by nbdcopy / nbdkit of the plain file"
    names = ("stasis", "nbdkit")
    return [ratio_row("image-to-null", title, figures["stasis"], figures["nbdkit"], 0.9, names, "bytes/s")]


def _copy_rate(lab: Lab, source: str, size: int, number: int) -> float:
    started = time.monotonic()
    lab.run(["nbdcopy", source, "null:"])
    return size / (time.monotonic() - started)


@group("snapshot-copy", tools=("nbdcopy",))
def snapshot_copy(bench: Bench) -> list[Row]:
    """``stasis snapshot copy`` of the whole image to a file against nbdcopy --flush; both end with durable
    data."""
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        stasis.attach(lab.data_file("stasis.img", bench.image_size), "disk", "--buffered")
        with held(lab, stasis, storage_directory(lab)) as uuid:
            source, target = stasis.image_uri(uuid), lab.path("copy.img")

            def ours(number: int) -> float:
                target.unlink(missing_ok=True)
                started = time.monotonic()
                stasis.call("snapshot", "copy", uuid, "disk", target)
                return bench.image_size / (time.monotonic() - started)

            def peers(number: int) -> float:
                return _copy_to_file(lab, source, target, bench.image_size)

            figures = alternate(bench, {"stasis": ours, "nbdcopy": peers})
    title = "snapshot copy of a whole image to a file / nbdcopy of the same image"
    names = ("stasis", "nbdcopy")
    return [ratio_row("snapshot-copy", title, figures["stasis"], figures["nbdcopy"], 1.0, names, "bytes/s")]


def _copy_to_file(lab: Lab, source: str, target: Path, size: int) -> float:
    target.unlink(missing_ok=True)
    started = time.monotonic()
    lab.run(["nbdcopy", "--flush", source, target])
    return size / (time.monotonic() - started)
