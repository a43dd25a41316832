# SPDX-License-Identifier: Apache-2.0
"""What tracking costs a live device: fio on a loop device, tracked and not, and the kernel's count of the programs."""

from __future__ import annotations

import json
import os
import tempfile
from functools import partial
from pathlib import Path

from groups import Bench, group
from lab import MIB, Lab
from report import Row, ratio_row, value_row

from stasis.linux import bpf, btf
from stasis.linux.bpfasm import R0, Assembler
from stasis.live import kerneltypes, pins, programs, tracking

NAMES = ("tracked", "untracked")
SLICES = 6
SIZE = 512 * MIB
RATE_LIMIT = 0.97
TIME_LIMIT = 200.0


@group("live-tracking-direct", "live-tracking-buffered", tools=("fio", "losetup"), needs_root=True, suite="live")
def live_tracking(bench: Bench) -> list[Row]:
    """4 KiB random writes at depth 32, two jobs."""
    rows = []
    for kind, direct in (("direct", True), ("buffered", False)):
        with bench.lab.scope() as lab:
            node = lab.loop_device(lab.data_file("disk.img", SIZE))
            figures = _compare(bench, lab, node, _state(lab), direct)
            title = f"fio 4 KiB random write, depth 32, two jobs, tracked / untracked, {kind}"
            rows.append(ratio_row(f"live-tracking-{kind}", title, figures["tracked"], figures["untracked"], RATE_LIMIT,
                                  NAMES, "operations/s"))
    return rows


def _compare(bench: Bench, lab: Lab, node: Path, state: Path, direct: bool) -> dict[str, list[float]]:
    """Operations per second of both, per round: each is the mean of SLICES runs that take turns.

    What the loop device's file system writes back in between makes the rate swing by half within seconds, far more than
    what is to be measured: so many short runs, and in an order in which a steady drift meets both alike.
    """
    run = {"tracked": partial(_tracked, lab, node, state, direct, bench.seconds / SLICES),
           "untracked": partial(_rate, lab, node, direct, bench.seconds / SLICES)}
    figures: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(bench.rounds):
        rates: dict[str, list[float]] = {name: [] for name in NAMES}
        for number in range(SLICES):
            for name in NAMES if number % 2 == 0 else NAMES[::-1]:
                os.sync()
                rates[name].append(run[name]())
        for name in NAMES:
            figures[name].append(sum(rates[name]) / SLICES)
    return figures


@group("live-tracking-time", tools=("fio", "losetup"), needs_root=True, suite="live")
def live_tracking_time(bench: Bench) -> list[Row]:
    """Time of our programs per write, less what the kernel's measuring itself takes, found with an empty program."""
    values, raw = [], []
    with bench.lab.scope() as lab:
        node = lab.loop_device(lab.data_file("disk.img", SIZE))
        state = _state(lab)
        for _ in range(bench.rounds):
            whole, net = _time_per_write(lab, node, state, bench.seconds)
            values.append(net)
            raw.append(whole)
    note = f"with the measuring itself {sorted(raw)[len(raw) // 2]:.0f} ns"
    title = "processor time of tracking per write, less that of an empty program"
    return [value_row("live-tracking-time", title, values, TIME_LIMIT, "ns", note)]


def _state(lab: Lab) -> Path:
    """A state directory, removed at clean-up."""
    directory = tempfile.TemporaryDirectory(prefix="live-")
    lab.on_exit(directory.cleanup)
    return Path(directory.name)


def _rate(lab: Lab, node: Path, direct: bool, seconds: float) -> float:
    """Writes per second."""
    output = lab.run(["fio", "--name=live", f"--filename={node}", "--rw=randwrite", "--bs=4k", "--iodepth=32",
                      "--numjobs=2", "--ioengine=libaio", f"--direct={int(direct)}", f"--runtime={seconds}",
                      "--time_based", "--group_reporting", "--output-format=json", "--eta=never"])
    return float(json.loads(output)["jobs"][0]["write"]["iops"])


def _tracked(lab: Lab, node: Path, state: Path, direct: bool, seconds: float) -> float:
    tracking.start(str(node), state).close()
    try:
        return _rate(lab, node, direct, seconds)
    finally:
        tracking.stop(str(node), state)


def _time_per_write(lab: Lab, node: Path, state: Path, seconds: float) -> tuple[float, float]:
    """Nanoseconds as the kernel counts them, and less its own share."""
    tracking.start(str(node), state).close()
    empty = _attach_empty()
    hooks = pins.Hooks(pins.directory_of(state))
    try:
        counting = bpf.enable_run_time_statistics()
        _rate(lab, node, True, seconds)
        os.close(counting)
        infos = [hooks.program(name) for name in programs.PROGRAMS]
        nothing = bpf.program_info(empty[0])
    finally:
        for fd in empty:
            os.close(fd)
        hooks.close()
        tracking.stop(str(node), state)
    writes = max(info.runs for info in infos)
    overhead = nothing.run_time_ns / nothing.runs
    whole = sum(info.run_time_ns for info in infos)
    return whole / writes, (whole - sum(info.runs for info in infos) * overhead) / writes


def _attach_empty() -> tuple[int, int]:
    """A program that does nothing whenever a request completes: its descriptor and that of its link."""
    asm = Assembler()
    asm.move(R0, 0)
    asm.exit()
    description, types = btf.write_functions([btf.FunctionType("entry", 1, takes_context=True)])
    described = bpf.load_btf(description)
    target = kerneltypes.read().events["block_rq_complete"].target
    program = bpf.load_program(asm.code(), "stasis_empty", target, described, [bpf.FunctionInfo(0, types[0])])
    os.close(described)
    return program, bpf.attach_raw(program)
