# SPDX-License-Identifier: Apache-2.0
"""A tracked origin without a snapshot, page-cached, against nbdkit and qemu-storage-daemon."""

from __future__ import annotations

import fio
from groups import Bench, Contestant, alternate, group
from lab import Lab
from ours import Stasis
from peers import start_nbdkit, start_qemu
from report import Row, ratio_row

TOOLS = ("fio", "nbdkit", "qemu-storage-daemon")
READ_LIMITS = {"nbdkit": 1.3, "qemu-storage-daemon": 2.0}
WRITE_LIMITS = {"nbdkit": 1.1, "qemu-storage-daemon": 1.2}


@group("randread-nbdkit", "randread-qemu", tools=TOOLS)
def randread(bench: Bench) -> list[Row]:
    """4 KiB random reads at depth 16."""
    return _against_peers(bench, "randread", "random read, tracked origin", READ_LIMITS)


@group("randwrite-nbdkit", "randwrite-qemu", tools=TOOLS)
def randwrite(bench: Bench) -> list[Row]:
    """4 KiB random writes at depth 16."""
    return _against_peers(bench, "randwrite", "random write, tracked origin", WRITE_LIMITS)


def _against_peers(bench: Bench, rw: str, title: str, limits: dict[str, float]) -> list[Row]:
    with bench.lab.scope() as lab:
        uris = _start_all(lab, bench.image_size)
        load = fio.Load(rw, fio.BLOCK, bench.image_size, bench.seconds)
        figures = alternate(bench, {name: _rate(lab, uri, load) for name, uri in uris.items()})
    return [
        ratio_row(
            f"{rw}-{'qemu' if 'qemu' in peer else peer}",
            f"{title} / {peer}",
            figures["stasis"],
            figures[peer],
            limit,
            ("stasis", peer),
            "operations/s",
        )
        for peer, limit in limits.items()
    ]


def _start_all(lab: Lab, size: int) -> dict[str, str]:
    """Each server has its own file, so that no two share its locks; those that wait use no time."""
    stasis = Stasis(lab).start()
    return {
        "stasis": stasis.attach(lab.data_file("stasis.img", size), "disk", "--buffered"),
        "nbdkit": start_nbdkit(lab, lab.data_file("nbdkit.img", size)),
        "qemu-storage-daemon": start_qemu(lab, lab.data_file("qemu.img", size)),
    }


def _rate(lab: Lab, uri: str, load: fio.Load) -> Contestant:
    return lambda number: fio.run(lab, uri, load).iops
