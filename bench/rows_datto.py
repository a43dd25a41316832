# SPDX-License-Identifier: Apache-2.0
"""dattobd's tracers: against the block engine's own copy-on-write, the plain device, and copying everything."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fio
from fio import Load
from groups import Bench, alternate, group
from lab import Lab
from ours import Stasis
from report import Row, ratio_row
from rows_snapshot import storage_directory

from stasis.nbd.client import Client

MINOR = 0


@contextmanager
def traced(lab: Lab, stasis: Stasis, *, incremental: bool = False) -> Iterator[Path]:
    """A tracer on the device ``disk``; its COW file."""
    cow = storage_directory(lab) / "cow"
    with stasis.client() as client:
        client.datto_setup([(MINOR, "disk", cow)], fallocated_space=2048)
        try:
            if incremental:
                client.datto_to_incremental(MINOR)
            yield cow
            if error := client.datto_info(MINOR).error:
                raise RuntimeError(f"the tracer failed with {error}")
        finally:
            client.datto_destroy(MINOR)


@contextmanager
def snapshot_of_parts(lab: Lab, stasis: Stasis) -> Iterator[None]:
    """The engine's own snapshot, with chunks of the size of dattobd's blocks."""
    words = ("snapshot", "create", "--storage", storage_directory(lab), "--chunk", "4K", "--take", "disk")
    uuid = stasis.call(*words)
    try:
        yield
    finally:
        stasis.destroy(uuid)


@group("datto-snapshot", tools=("fio",), suite="datto")
def snapshot_mode(bench: Bench) -> list[Row]:
    """Random 4 KiB writes, each to a block that is not kept yet."""
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        uri = stasis.attach(lab.data_file("stasis.img", bench.image_size), "disk", "--buffered")
        places = random.Random(1).sample(range(bench.image_size // fio.BLOCK), bench.image_size // fio.BLOCK // 4)
        trace = fio.write_trace(lab.path("trace"), [(place * fio.BLOCK, fio.BLOCK) for place in places])
        load = Load("write", fio.BLOCK, bench.image_size, trace=trace)

        def tracer(_number: int) -> float:
            with traced(lab, stasis):
                return fio.run(lab, uri, load).iops

        def engine(_number: int) -> float:
            with snapshot_of_parts(lab, stasis):
                return fio.run(lab, uri, load).iops

        found = alternate(bench, {"tracer": tracer, "engine": engine})
    title = "first 4 KiB random writes, tracer in snapshot mode / engine's copy-on-write with 4 KiB chunks"
    return [ratio_row("datto-snapshot", title, found["tracer"], found["engine"], 1 / 1.1, ("tracer", "engine"),
                      "operations/s")]


@group("datto-incremental", tools=("fio",), suite="datto")
def incremental_mode(bench: Bench) -> list[Row]:
    """Random 4 KiB writes for a while, on a device with a tracer and on the same without."""
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        uri = stasis.attach(lab.data_file("stasis.img", bench.image_size), "disk", "--buffered")
        load = Load("randwrite", fio.BLOCK, bench.image_size, bench.seconds)

        def tracer(_number: int) -> float:
            with traced(lab, stasis, incremental=True):
                return fio.run(lab, uri, load).iops

        found = alternate(bench, {"tracer": tracer, "plain": lambda _: fio.run(lab, uri, load).iops})
    title = "random 4 KiB writes, tracer in incremental mode / device without a tracer"
    return [ratio_row("datto-incremental", title, found["tracer"], found["plain"], 0.97, ("tracer", "plain"),
                      "operations/s")]


@group("update-img-dd", "update-img-bare", tools=("dd",), suite="datto")
def update_image(bench: Bench) -> list[Row]:
    """One block in a hundred changed: update-img, dd of the whole, and a loop over just these blocks."""
    blocks = sorted(random.Random(2).sample(range(bench.image_size // fio.BLOCK), bench.image_size // fio.BLOCK // 100))
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        origin = lab.data_file("stasis.img", bench.image_size)
        uri = stasis.attach(origin, "disk", "--buffered")
        copy = lab.data_file("copy.img", bench.image_size)
        first, second = (storage_directory(lab) / name for name in ("cow0", "cow1"))
        with stasis.client() as client:
            client.datto_setup([(MINOR, "disk", first)], fallocated_space=256)
            client.datto_to_incremental(MINOR)
            with Client.connect(uri) as export:
                export.write_many([(block * fio.BLOCK, os.urandom(fio.BLOCK)) for block in blocks])
            client.datto_to_snapshot(MINOR, second)
        listed = lab.path("blocks")
        listed.write_text("".join(f"{block}\n" for block in blocks))
        update = [sys.executable, "-c", CONSOLE_SCRIPT, f"/dev/datto{MINOR}", str(first), str(copy)]
        copy_all = ["dd", f"if={origin}", f"of={copy}", "bs=1M", "conv=notrunc,fsync", "status=none"]
        found = alternate(bench, {
            "update-img": partial(_rate, lambda: lab.run(["env", *stasis.variables(), *update])),
            "dd": partial(_rate, lambda: lab.run(copy_all)),
            "bare": partial(_rate, lambda: lab.run([sys.executable, "-c", COPY_BLOCKS, origin, copy, listed])),
        })
        with stasis.client() as client:
            client.datto_destroy(MINOR)
    whole = "update-img with 1 % changed / dd of the whole image"
    bare = "update-img with 1 % changed / a program that reads and writes just these blocks"
    return [
        ratio_row("update-img-dd", whole, found["update-img"], found["dd"], 5.0, ("update-img", "dd"), "runs/s"),
        ratio_row("update-img-bare", bare, found["update-img"], found["bare"], 1 / 1.5, ("update-img", "bare"),
                  "runs/s"),
    ]


def _rate(run: Callable[[], object], _number: int) -> float:
    started = time.monotonic()
    run()
    return 1 / (time.monotonic() - started)


CONSOLE_SCRIPT = "import sys; from stasis.cli.update_img import main; sys.exit(main())"
"""What an installer writes into the file `update-img`."""

COPY_BLOCKS = """
import os, sys
source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDWR)
for block in map(int, open(sys.argv[3])):
    os.pwrite(target, os.pread(source, 4096, block * 4096), block * 4096)
os.fsync(target)
"""
"""The least that must be done, as a program of its own, as update-img is one."""
