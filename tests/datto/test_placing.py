# SPDX-License-Identifier: Apache-2.0
"""What helpers left that were killed while they made a COW file goes, and what is being made stays."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from stasis.datto import placing


def test_a_file_that_is_being_made_is_locked_and_others_go_whoever_has_their_pid_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing.immutable, "set_immutable", lambda fd, flag: None)  # not all file systems have it
    path = str(tmp_path / ".cow")
    left, made = (Path(placing.temporary_name(path, pid)) for pid in (os.getpid(), os.getppid()))
    for name in (left, made):
        name.write_bytes(b"unfinished")
    with made.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        placing._remove_stale(path)
        assert (left.exists(), made.exists()) == (False, True)
