# SPDX-License-Identifier: Apache-2.0
"""The memory that an index takes from the system, of a process that traces a device of 4 TiB (a sparse file)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LONG = bool(os.environ.get("STASIS_LONG"))
CACHE = (300 if LONG else 24) << 20
SLACK = 16 << 20

TRACE = """
import os, random, sys
from stasis.datto.cowfile import CowFile
from stasis.datto.layout import Geometry, Header, SECTION_BLOCKS

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

path, cache, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
geometry, choose = Geometry(4 << 40), random.Random(seed)
fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
os.truncate(fd, geometry.data_offset)
header = Header(2, geometry.first_slot, geometry.data_offset, 1, bytes(16))
before = peak()
cow = CowFile(path, fd, geometry, header, cache, fresh=True)
for section in choose.sample(range(geometry.sections), 3 * cache // 32768):
    cow.mark(section * SECTION_BLOCKS, section * SECTION_BLOCKS + 1)
for _ in range(2000):
    cow.index.runs_without(section := choose.randrange(geometry.blocks), section + 1)
print(peak() - before, cow.header.changed_blocks)
"""


def test_it_stays_below_the_cache_and_16_mib(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-c", TRACE, str(tmp_path / "cow"), str(CACHE), str(seed)]
    taken, changed = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert changed == 3 * CACHE // 32768
    assert CACHE // 2 < taken <= CACHE + SLACK
