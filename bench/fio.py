# SPDX-License-Identifier: Apache-2.0
"""fio's nbd engine: the same load for every server, told as JSON."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Lab, LabError

__all__ = ["FioResult", "Load", "background", "first_touch_trace", "run", "write_trace"]

BLOCK = 4096
CHUNK = 64 * 1024
# The size of the image must be told: fio asks the server only after it has laid out the job.
FIO_TIMEOUT_MARGIN = 240.0


@dataclass(frozen=True, slots=True)
class Load:
    """A job. Bounded by ``seconds``, or by the trace or by one pass over ``size`` when ``seconds`` is
    None."""

    rw: str
    block_size: int
    size: int
    seconds: float | None = None
    depth: int = 16
    trace: Path | None = None
    seed: int = 1
    rate_iops: int | None = None

    def arguments(self, uri: str) -> list[str]:
        """The command line of fio."""
        words = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
        words += [f"--rw={self.rw}", f"--bs={self.block_size}", f"--size={self.size}", f"--iodepth={self.depth}"]
        words += [f"--randseed={self.seed}", "--eta=never"]
        if self.rate_iops is not None:
            words.append(f"--rate_iops={self.rate_iops}")
        if self.trace is not None:
            words += [f"--read_iolog={self.trace}", "--replay_no_stall=1"]
        elif self.seconds is not None:
            words += [f"--runtime={self.seconds}", "--time_based"]
        return words


@dataclass(frozen=True, slots=True)
class FioResult:
    """Operations per second, bytes per second, seconds, bytes; the 99th percentile of latency in
    milliseconds."""

    iops: float
    bandwidth: float
    seconds: float
    bytes_moved: int
    latency_ms: float


def run(lab: Lab, uri: str, load: Load) -> FioResult:
    """Run a job to its end. Raises LabError when fio or any of its I/O fails."""
    text = lab.run(load.arguments(uri), timeout=(load.seconds or 0) + FIO_TIMEOUT_MARGIN)
    return parse(text)


def background(lab: Lab, uri: str, load: Load) -> subprocess.Popen[bytes]:
    """Start a job that runs while something else is measured; it is stopped at the scope's clean-up."""
    return lab.start(load.arguments(uri), server=False)


def parse(text: str) -> FioResult:
    """The result out of fio's JSON. (Its terse form has no stable place for the figures of the nbd
    engine.)"""
    try:
        job = json.loads(text[text.index("{") :])["jobs"][0]
    except (ValueError, LookupError) as error:
        raise LabError(f"fio said no result: {text[:200]!r}") from error
    if job["error"]:
        raise LabError(f"fio ended with error {job['error']}")
    side: dict[str, Any] = max(job["read"], job["write"], key=lambda figures: figures["io_bytes"])
    latency = side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1e6
    return FioResult(side["iops"], side["bw_bytes"], side["runtime"] / 1000, side["io_bytes"], latency)


def first_touch_trace(path: Path, size: int, count: int, seed: int) -> Path:
    """A trace of 4 KiB writes in random order of which each falls into another 64 KiB chunk.

    fio itself cannot do this: with blockalign it gives up the map of what it has written, and without it a
    random 4 KiB write soon falls into a chunk that an earlier one has touched.
    """
    chunks = random.Random(seed).sample(range(size // CHUNK), count)
    inside = random.Random(seed + 1)
    offsets = [chunk * CHUNK + inside.randrange(CHUNK // BLOCK) * BLOCK for chunk in chunks]
    return write_trace(path, [(offset, BLOCK) for offset in offsets])


def write_trace(path: Path, writes: list[tuple[int, int]]) -> Path:
    """Write fio's iolog, version 2 (HOWTO, "Trace file format v2")."""
    lines = [f"disk write {offset} {length}" for offset, length in writes]
    path.write_text("\n".join(["fio version 2 iolog", "disk add", "disk open", *lines, "disk close", ""]))
    return path
