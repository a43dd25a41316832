# SPDX-License-Identifier: Apache-2.0
"""What /proc and prctl say about real processes."""

import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from stasis.linux import process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as child:
        yield child
        child.kill()


def test_boot_id_is_a_uuid_and_stays() -> None:
    assert uuid.UUID(process.boot_id()).int
    assert process.boot_id() == process.boot_id()


def test_a_process_is_seen_by_name_and_start(sleeper: subprocess.Popen[bytes]) -> None:
    assert sleeper.pid in process.processes()
    start = process.start_time(sleeper.pid)
    own = process.start_time(os.getpid())
    assert start is not None
    assert own is not None
    assert start >= own
    sleeper.kill()
    sleeper.wait()
    assert process.start_time(sleeper.pid) is None
    assert process.name(sleeper.pid) == "?"
    assert process.open_descriptors(sleeper.pid) == []


def test_start_time_survives_a_name_with_a_parenthesis() -> None:
    code = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'a) (b) 1');"  # PR_SET_NAME
        "print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        assert process.name(child.pid) == "a) (b) 1"
        assert (process.start_time(child.pid) or 0) > 0
        child.communicate("")


def test_pidfd_becomes_readable_at_the_end_and_signals_only_that_process(
    sleeper: subprocess.Popen[bytes],
) -> None:
    pidfd = process.pidfd_open(sleeper.pid)
    try:
        assert select.select([pidfd], [], [], 0)[0] == []
        assert process.signal_pidfd(pidfd, signal.SIGTERM)
        assert select.select([pidfd], [], [], 60)[0] == [pidfd]
        sleeper.wait()
        assert not process.signal_pidfd(pidfd, signal.SIGTERM)
    finally:
        os.close(pidfd)


def test_pidfd_of_no_process_says_so() -> None:
    with pytest.raises(ProcessLookupError, match="pidfd_open"):
        process.pidfd_open(2**22 + 1)


def test_child_dies_with_its_parent() -> None:
    grandchild = (
        "from stasis.linux import process; import time;"
        "process.set_parent_death_signal(); print('up', flush=True); time.sleep(1000)"
    )
    child = (
        "import subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", child],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pidfd = process.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            assert select.select([pidfd], [], [], 60)[0] == [pidfd]
        finally:
            os.close(pidfd)


def test_io_flusher_is_shown_by_the_kernel() -> None:
    code = (
        "import ctypes; from stasis.linux import process; process.set_io_flusher();"
        "print(ctypes.CDLL(None).prctl(58, 0, 0, 0, 0))"  # PR_GET_IO_FLUSHER
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("needs CAP_SYS_RESOURCE")
    assert done.stdout == "1\n"
