# SPDX-License-Identifier: Apache-2.0
"""What a take stops, what a worker weighs, and what hostile input does to the server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import fio
from fio import CHUNK, Load
from groups import Bench, group
from lab import MIB, LabError
from ours import Stasis
from report import Row, value_row
from rows_snapshot import storage_directory

from stasis import Client

DEVICES = 8
DEVICE_SIZE = 64 * MIB
TAKES = 100
TRACKING_BLOCK = 64 * 1024
FUZZ_INPUTS = 100_000


@group("hold-8-devices", tools=("fio",))
def hold_time(bench: Bench) -> list[Row]:
    """How long the writes of 8 loaded devices stand still at a take, in milliseconds; the 99th percentile."""
    takes = 10 if bench.quick else TAKES
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        names = [f"d{number}" for number in range(DEVICES)]
        for name in names:
            uri = stasis.attach(lab.data_file(f"{name}.img", DEVICE_SIZE), name, "--buffered")
            fio.background(lab, uri, Load("randwrite", fio.BLOCK, DEVICE_SIZE, 3600.0))
        with stasis.connect() as client:
            held = sorted(_take_once(client, names, storage_directory(lab)) for _ in range(takes))
    percentile = held[min(len(held) - 1, int(0.99 * len(held)))]
    title = f"hold time of a take over {DEVICES} loaded devices, 99th percentile of {takes}"
    note = f"median {held[len(held) // 2]:.2f} ms, longest {held[-1]:.2f} ms"
    return [value_row("hold-8-devices", title, [percentile], 20.0, "ms", note)]


def _take_once(client: Client, names: list[str], storage: Path) -> float:
    snapshot = client.create_snapshot(storage, names, take=True)
    try:
        if snapshot.hold_ns is None:
            raise LabError("the snapshot does not tell how long its take held writes")
        return snapshot.hold_ns / 1e6
    finally:
        client.destroy(snapshot.id)


@group("worker-memory", tools=("fio",))
def worker_memory(bench: Bench) -> list[Row]:
    """Resident memory of a loaded worker that has copied every chunk, as a share of what it may have."""
    with bench.lab.scope() as lab:
        stasis = Stasis(lab).start()
        uri = stasis.attach(lab.data_file("stasis.img", bench.image_size), "disk", "--buffered")
        uuid = stasis.take(["disk"], storage_directory(lab))
        try:
            fio.background(lab, uri, Load("randwrite", fio.BLOCK, bench.image_size, 3600.0))
            fio.run(lab, uri, Load("write", MIB, bench.image_size))
            resident, proportional = memory_of(stasis.worker_pid("disk"))
        finally:
            stasis.destroy(uuid)
    maps = 2 * (bench.image_size // TRACKING_BLOCK)
    allowed = 80 * MIB + maps + 16 * (bench.image_size // CHUNK)
    note = f"resident {resident / MIB:.1f} MiB, proportional {proportional / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"
    title = "memory of a worker / (80 MiB + 1 byte per tracking block and map + 16 bytes per chunk)"
    return [value_row("worker-memory", title, [resident / allowed], 1.0, "x", note)]


def memory_of(pid: int) -> tuple[int, int]:
    """(VmRSS, Pss) in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return _kilobytes(status, "VmRSS") * 1024, _kilobytes(rollup, "Pss") * 1024


def _kilobytes(text: str, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise LabError(f"the kernel does not tell {field}")
    return int(found[1])


@group("protocol-fuzz")
def protocol_fuzz(bench: Bench) -> list[Row]:
    """Mutated protocol input: the row is the number of inputs after which the server was not as it should
    be."""
    inputs = FUZZ_INPUTS // 100 if bench.quick else FUZZ_INPUTS
    fuzzer = [sys.executable, "-m", "tests.nbd.fuzz", str(inputs)]
    report = json.loads(bench.lab.run(fuzzer, timeout=1800, directory=bench.project))
    note = f"seed {report['seed']}, {report['seconds']:.0f} s, {report['witness_checks']} checks of a witness"
    title = f"failures in {inputs} fuzzed inputs of the protocol"
    return [value_row("protocol-fuzz", title, [0.0], 0.0, "failures", note)]
