# SPDX-License-Identifier: Apache-2.0
"""Locks on files are held again after a restore, by whom they were held."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from stasis.process.files.options import FileOptions
from tests.process.cycles import cycle, findings_of
from tests.process.programs import compiled, running

pytestmark = pytest.mark.root

F_OFD_SETLK = 37
TRY = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) if sys.argv[2] == "flock" else fcntl.lockf(
            file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))
    except BlockingIOError:
        sys.exit(11)
"""


def _is_locked(path: Path, what: str) -> bool:
    """Whether another process is refused a lock: the whole file's, or that of one byte."""
    code = subprocess.run([sys.executable, "-S", "-c", TRY, str(path), what], check=False).returncode
    assert code in (0, 11)
    return code == 11


def test_locks_of_all_kinds_are_held_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    def set_up() -> list[int]:
        whole, ranges = (os.open(path, os.O_RDWR) for _ in range(2))
        fcntl.flock(whole, fcntl.LOCK_SH)
        fcntl.lockf(ranges, fcntl.LOCK_EX, 10, 5)
        fcntl.fcntl(whole, F_OFD_SETLK, struct.pack("<hh4xqqi4x", fcntl.F_WRLCK, 0, 100, 0, 0))
        return [whole, ranges, os.dup(whole)]

    def verify(fds: list[int]) -> None:
        assert _is_locked(path, "flock")
        assert [_is_locked(path, str(byte)) for byte in (4, 5, 14, 15, 99, 100)] == [0, 1, 1, 0, 0, 1]
        os.close(fds[1])
        assert not _is_locked(path, "5")
        os.close(fds[0])
        assert _is_locked(path, "flock"), "the duplicate holds it still"

    cycle(tmp_path / "images", set_up, verify, options=FileOptions(file_locks=True))


def test_a_lock_is_named_with_the_option(tmp_path: Path) -> None:
    def set_up() -> int:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    (finding,) = findings_of(set_up, tmp_path / "images")
    assert (finding.reason, finding.option) == ("the file is locked", "--file-locks")


def test_a_lock_that_somebody_else_took_is_named(tmp_path: Path) -> None:
    def set_up() -> int:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    with open(tmp_path / "file", "w") as ours, pytest.raises(AssertionError, match="is locked by another one"):
        cycle(
            tmp_path / "images", set_up, lambda _: None, options=FileOptions(file_locks=True),
            between=lambda: fcntl.flock(ours, fcntl.LOCK_EX),
        )  # fmt: skip


MAPPED = r"""
int main(void) {
    int fd = open("locked", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(!ftruncate(fd, 4096));
    CHECK(mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) != MAP_FAILED);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 7, .l_len = 3};
    CHECK(!fcntl(fd, F_SETLK, &lock));
    set_up();
    return content();
}
"""


@pytest.mark.tool("gcc")
def test_a_lock_on_a_file_that_is_mapped_too(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, MAPPED)) as program:
        program.restore(program.dump("--file-locks"))
        assert _is_locked(tmp_path / "locked", "8")
        assert not _is_locked(tmp_path / "locked", "10")
        program.finish()


def test_leases_are_held_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    def set_up() -> list[int]:
        reading, writing = os.open(file, os.O_RDONLY), os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
        fcntl.fcntl(reading, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(writing, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return [reading, writing]

    def verify(fds: list[int]) -> None:
        assert [fcntl.fcntl(fd, fcntl.F_GETLEASE) for fd in fds] == [fcntl.F_RDLCK, fcntl.F_WRLCK]
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
        if not (child := os.fork()):
            with contextlib.suppress(BlockingIOError):
                os.open(file, os.O_WRONLY | os.O_NONBLOCK)
            os._exit(0)
        assert signal.sigwait([signal.SIGIO]) == signal.SIGIO
        os.waitpid(child, 0)

    (finding, _) = findings_of(set_up, tmp_path / "refused")
    assert finding.option == "--file-locks"
    cycle(tmp_path / "images", set_up, verify, options=FileOptions(file_locks=True))
