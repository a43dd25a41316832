# SPDX-License-Identifier: Apache-2.0
"""Machines and users that cannot track or freeze: one sentence, a hint, and all that was there goes on unharmed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.cli.main import main
from stasis.errors import ExitCode, UnsupportedError
from stasis.linux import bpf, btf, libc
from stasis.live import devicefile, pins, tracking
from stasis.live.identity import identify
from tests.live.disks import MIB, Disk, fast_folder, formatted
from tests.live.writers import bpf_works, loop_device, state_directory
from tests.runner import Stasis

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

SAID = re.compile(r"stasis: [^\n]+\nhint: [^\n]+\n")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "image", 16 * MIB) as node:
        yield node


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory in which a device is tracked, whatever becomes of the others."""
    directory = tmp_path_factory.mktemp("home")
    with loop_device(directory / "keeper", MIB) as keeper, state_directory(directory / "state") as state:
        tracking.start(keeper, state).close()
        yield state


@pytest.fixture
def state(home: Path) -> Iterator[Path]:
    [kept] = devicefile.names(home)
    yield home
    assert devicefile.names(home) == [kept]
    found = tracking.inspect(kept, home)
    assert found.lost == ""
    fd = os.open(found.path, os.O_WRONLY)
    os.pwrite(fd, b"x", 0)
    os.fsync(fd)
    os.close(fd)
    assert tracking.inspect(kept, home).changed_blocks == 1


# -- who may track ----------------------------------------------------------------------------------------------------

WITHOUT_RIGHTS = {
    "no capabilities": ["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
    "a container's capabilities": ["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin"],
    "a user namespace": ["unshare", "--user", "--map-root-user"],
}
LOCKED_DOWN = """
mount -t tmpfs none /sys/kernel/security
echo 'none integrity [confidentiality]' > /sys/kernel/security/lockdown
exec setpriv --bounding-set=-bpf,-perfmon,-sys_admin "$@"
"""


def refused(how: list[str], *words: str | Path) -> tuple[int, str]:
    """Exit code and message of a command that runs in some way."""
    done = subprocess.run([*how, sys.executable, "-m", "stasis", *map(str, words)], capture_output=True, text=True,
                          check=False)
    assert SAID.fullmatch(done.stderr), done.stderr
    return done.returncode, done.stderr


@pytest.mark.tool("setpriv", "unshare")
@pytest.mark.parametrize("how", WITHOUT_RIGHTS)
def test_without_the_rights_nothing_is_tracked(node: str, state: Path, tmp_path: Path, how: str) -> None:
    where = tmp_path / "new" if how == "no capabilities" else state
    code, said = refused(WITHOUT_RIGHTS[how], "track", "start", node, "--state-dir", where)
    assert code == ExitCode.PERMISSION
    assert "does not let this user load BPF programs" in said
    assert "CAP_BPF" in said
    assert not pins.directory_of(tmp_path / "new").exists()


@pytest.mark.tool("setpriv", "unshare")
def test_a_kernel_that_is_locked_down_is_named(node: str, tmp_path: Path) -> None:
    code, said = refused(["unshare", "--mount", "sh", "-ec", LOCKED_DOWN, "sh"], "track", "start", node, "--state-dir",
                         tmp_path / "new")
    assert (code, "locked down (confidentiality)" in said) == (ExitCode.UNSUPPORTED, True)


def test_other_users_than_root_are_sent_away(node: str, state: Path, tmp_path: Path) -> None:
    """In a child of ours: nobody may be unable to read the very Python that runs here."""
    assert main(["track", "list", "--state-dir", str(state)]) == 0
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with open(writer, "w") as sys.stderr:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            code = main(["track", "start", node, "--state-dir", str(tmp_path)])
        os._exit(code)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ExitCode.PERMISSION
    assert SAID.fullmatch(said), said
    assert "sudo" in said


def test_a_device_that_even_root_may_not_open_is_no_case_for_sudo(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the device rules of a container."""
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(Exception, match="not even by root") as caught:
        identify(node)
    assert "sudo" not in caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.tool("unshare")
def test_without_sysfs_it_says_so(node: str, state: Path) -> None:
    code, said = refused(["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /sys; exec "$@"', "sh"],
                         "track", "start", node, "--state-dir", state)
    assert (code, "there is no /sys/dev/block" in said) == (ExitCode.UNSUPPORTED, True)


# -- what the kernel has ----------------------------------------------------------------------------------------------

NO_BPF = """
import os, sys
from tests.live.test_faults import forbid_bpf
forbid_bpf()
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def forbid_bpf() -> None:
    """From here on bpf(2) says ENOSYS in this process, as a kernel without it (seccomp(2), linux/filter.h)."""
    number = bpf.SYS_BPF[os.uname().machine]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    program = b"".join(struct.pack("<HBBI", *words) for words in (
        (load, 0, 0, 0), (equal, 0, 1, number), (give, 0, 0, 0x00050000 | 38), (give, 0, 0, 0x7FFF0000)))
    held = ctypes.create_string_buffer(program)
    filters = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(held)))
    libc.check(libc.libc.prctl(38, 1, 0, 0, 0), "prctl")
    libc.check(libc.libc.prctl(22, 2, ctypes.addressof(filters), 0, 0), "prctl")


def test_a_kernel_without_bpf_is_named(node: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", NO_BPF, "-m", "stasis", "track", "start", node, "--state-dir",
                           str(tmp_path / "state")], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])
    assert (done.returncode, "this kernel has no bpf(2)" in done.stderr) == (ExitCode.UNSUPPORTED, True), done.stderr
    assert SAID.fullmatch(done.stderr)


@pytest.mark.parametrize("event", ["block_rq_complete", "block_bio_queue"])
def test_a_tracepoint_that_is_missing_is_named(node: str, tmp_path: Path, event: str, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """A description of the kernel that has it by another name."""
    name = f"btf_trace_{event}".encode()
    described = tmp_path / "vmlinux"
    described.write_bytes(btf.VMLINUX.read_bytes().replace(name + b"\0", name[:-1] + b"?\0"))
    monkeypatch.setattr(btf, "VMLINUX", described)
    where = tmp_path / "state"
    with pytest.raises(UnsupportedError, match=event):
        tracking.start(node, where)
    assert tracking.tracked(where) == []
    assert not pins.directory_of(where).exists()
    assert main(["track", "show", "--capabilities", "--state-dir", str(where)]) == ExitCode.OK
    assert re.search(rf"tracepoint {event} +no ", capsys.readouterr().out)


# -- freezing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tracked(stasis: Stasis, disk: Disk, folder: Path) -> Iterator[None]:
    with state_directory(stasis.state_dir):
        stasis("repo", "init", folder / "repo", "--no-encryption")
        stasis("track", "start", disk.node)
        yield
        assert stasis.json("track", "show", os.path.basename(disk.node))["lost"] == ""
        stasis("track", "stop", disk.node)


@pytest.mark.tool("mkfs.ext4", "setpriv", "prlimit")
def test_without_memory_that_may_be_locked_nothing_is_frozen(stasis: Stasis, tmp_path: Path) -> None:
    """A watchdog that could be swapped out is none."""
    with formatted("ext4", tmp_path) as disk, fast_folder(tmp_path) as folder, tracked(stasis, disk, folder):
        create = [*stasis.command, "backup", "create", disk.node, "--repo", str(folder / "repo")]
        done = subprocess.run(["prlimit", "--memlock=65536", "setpriv", "--bounding-set=-ipc_lock", *create],
                              env=stasis.environment, capture_output=True, text=True, check=False)
        assert done.returncode == ExitCode.FAILURE, done.stderr
        assert "the watchdog of the freeze did not start" in done.stderr
        assert "ulimit -l" in done.stderr
        (disk.directory / "file").write_text("it takes writes")
