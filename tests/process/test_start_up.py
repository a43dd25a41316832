# SPDX-License-Identifier: Apache-2.0
"""A restore starts fast: it imports what a small process needs, and no more. Each module here costs it milliseconds."""

from __future__ import annotations

import subprocess
import sys

COSTLY = {"ast", "bz2", "dataclasses", "inspect", "ipaddress", "json", "pathlib", "shutil", "socket", "subprocess",
          "tempfile", "urllib.parse", "logging", "stasis.process.images.schema.events"}  # fmt: skip
PROGRAM = """
import sys
before = set(sys.modules)
from stasis.cli.main import build_parser
build_parser(["process", "restore"]).parse_args(["process", "restore", "--images", "nowhere"])
import stasis.process.restore.job
print(*set(sys.modules) - before)
"""


def test_a_restore_imports_nothing_that_is_slow() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    imported = set(done.stdout.split())
    assert "stasis.process.restore.job" in imported
    assert not imported & COSTLY
