# SPDX-License-Identifier: Apache-2.0
"""What images have no field for is told at the dump."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.programs import compiled, cycle, running, stasis

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

SETTINGS = r"""
int main(void) {
    int filter = open("/proc/self/coredump_filter", O_WRONLY);
    CHECK(write(filter, "0x7f", 4) == 4 && !close(filter));
    CHECK(!syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 1));
    CHECK(!mlockall(MCL_FUTURE));
    CHECK(!prctl(29 /* PR_SET_TIMERSLACK */, 70000, 0, 0, 0));
    prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0);
    prctl(53 /* PR_SET_SPECULATION_CTRL */, 0, 4, 0, 0);
    CHECK(mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    CHECK(sysconf(_SC_NPROCESSORS_ONLN) == 1 || !sched_setaffinity(0, sizeof one, &one));
    set_up();
    return content();
}
"""


def can_deny_executable_memory() -> bool:
    """Asked of the kernel (Linux 6.3) by a process that has it denied from then on."""
    code = "import ctypes; raise SystemExit(ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) != 0)"
    return not subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_what_is_lost_is_told(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, SETTINGS)) as program:
        told = stasis("dump", program.pid, "--images", tmp_path / "images", "--leave-running", "--json")
        warnings = "\n".join(json.loads(told)["warnings"])
        for what in "I/O priority", "core dump filter", "MCL_FUTURE", "timer slack":
            assert what in warnings
        status = Path(f"/proc/{program.pid}/status").read_text()
        assert ("PR_SET_SPECULATION_CTRL" in warnings) is ("thread mitigated" in status)
        assert ("PR_SET_MDWE" in warnings) is can_deny_executable_memory()
        program.finish()


def test_a_process_that_may_not_make_memory_executable(tmp_path: Path) -> None:
    """As a service with MemoryDenyWriteExecute=: we need a page of code in it all the same."""
    code = "int main(void) { prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0); set_up(); return content(); }"
    cycle(tmp_path, code)


def test_an_ordinary_process_loses_nothing(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, "int main(void) { set_up(); return content(); }")) as program:
        told = stasis("dump", program.pid, "--images", tmp_path / "images", "--leave-running", "--json")
        assert json.loads(told)["warnings"] == []
        program.finish()


DATAGRAMS = """
import os, socket, time
from pathlib import Path
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.IPPROTO_UDP, 104, 1)  # UDP_GRO
sock.bind(("127.0.0.1", 0))
sock.sendto(b"to myself", sock.getsockname())
Path("ready").touch()
while not os.path.exists("go"):
    time.sleep(0.003)
assert sock.recv(100) == b"to myself"
Path("content").touch()
"""


def test_datagrams_that_may_have_been_joined_are_told_of(tmp_path: Path) -> None:
    with running(tmp_path, sys.executable, "-c", DATAGRAMS) as program:
        told = stasis("dump", program.pid, "--images", tmp_path / "images", "--leave-running", "--json")
        (warning,) = json.loads(told)["warnings"]
        assert "datagrams that came and were not read yet will be gone" in warning
        program.finish()  # it has them still
