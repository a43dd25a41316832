# SPDX-License-Identifier: Apache-2.0
"""What change tracking costs: the same worker with a change map and without one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import fio
from bare_worker import start_worker
from fio import Load
from groups import Bench, alternate, group
from lab import MIB, Lab
from report import Row, ratio_row
from throttle import IOPS, make_slow_disk

NAMES = ("tracking", "no tracking")
DISK_SIZE = 256 * MIB


@group("tracking-cached", tools=("fio",))
def tracking_cached(bench: Bench) -> list[Row]:
    """4 KiB random writes, page-cached."""
    with bench.lab.scope() as lab:
        paths = [lab.data_file(f"{name}.img", bench.image_size) for name in ("on", "off")]
        load = Load("randwrite", fio.BLOCK, bench.image_size, bench.seconds)
        return [_measure(bench, lab, paths, load, buffered=True, name="tracking-cached", limit=0.97)]


@group("tracking-disk", tools=("fio", "losetup"), needs_root=True)
def tracking_disk(bench: Bench) -> list[Row]:
    """4 KiB random writes, as many as a slow disk takes."""
    with bench.lab.scope() as lab:
        paths = [make_slow_disk(lab, lab.data_file(f"{name}.img", DISK_SIZE)).path for name in ("on", "off")]
        trace = fio.first_touch_trace(lab.path("trace"), DISK_SIZE, int(IOPS * bench.seconds) % 4096 or 4096, 3)
        load = Load("write", fio.BLOCK, DISK_SIZE, trace=trace)
        return [_measure(bench, lab, paths, load, buffered=False, name="tracking-disk", limit=0.99)]


def _measure(bench: Bench, lab: Lab, paths: list[Path], load: Load, *, buffered: bool, name: str, limit: float) -> Row:
    uris = [start_worker(lab, path, tracking=path is paths[0], buffered=buffered) for path in paths]

    def rate(uri: str, number: int) -> float:
        return fio.run(lab, uri, load).iops

    figures = alternate(bench, {key: partial(rate, uri) for key, uri in zip(NAMES, uris, strict=True)})
    where = "page-cached" if buffered else "disk-bound"
    title = f"4 KiB random write, change tracking on / off, {where}"
    return ratio_row(name, title, figures[NAMES[0]], figures[NAMES[1]], limit, NAMES, "operations/s")
