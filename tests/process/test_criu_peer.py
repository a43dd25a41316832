# SPDX-License-Identifier: Apache-2.0
"""CRIU restores what we dump, and we restore what it dumps, where there is a CRIU that works on this kernel; and what
its images have that ours have not, without one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stasis.errors import StasisError
from stasis.linux import ptrace, timerfd
from stasis.linux.mountinfo import MountInfo
from stasis.process.files import sockopts
from stasis.process.files.iptables import drop_rules
from stasis.process.files.options import FileOptions
from stasis.process.images.schema import InetSkEntry
from stasis.process.images.schema.namespaces import FsType, MntEntry
from stasis.process.namespaces import mnt
from stasis.process.remote import RemoteThread
from tests.process.containers import container
from tests.process.cycles import cycle
from tests.process.messages import minimal
from tests.process.programs import Program, compiled, running, stasis, wait_for
from tests.process.test_memory_kinds import KINDS, SHARED
from tests.process.test_tcp import ECHO, server
from tests.process.victims import counting

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

CRIU = shutil.which(os.environ.get("CRIU", "criu")) or ""
THREADS = r"""
// Two threads, a child that has ended, a pipe with something in it, a file.
static int ends[2], file;
static volatile int counted;
static void *count(void *unused) { while (1) { counted++; usleep(1000); } }
int main(void) {
    pthread_t thread;
    pid_t child = fork();
    if (!child) _exit(7);
    siginfo_t told;
    CHECK(!waitid(P_PID, child, &told, WEXITED | WNOWAIT));
    CHECK(!pipe(ends) && write(ends[1], "piped", 5) == 5);
    file = open("data", O_RDWR | O_CREAT, 0600);
    CHECK(write(file, "one", 3) == 3);
    pthread_create(&thread, 0, count, 0);
    set_up();
    int before = counted, status;
    char found[8] = "";
    while (counted < before + 10) usleep(1000);
    CHECK(read(ends[0], found, 8) == 5 && !strcmp(found, "piped"));
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7);
    CHECK(lseek(file, 0, SEEK_CUR) == 3);
    return content();
}
"""


@functools.cache
def _criu_works() -> bool:
    """Debian 12's does not on kernels from 6.13 on; one before 4.2 reads none of our page counts."""
    if not CRIU:
        return False
    version = subprocess.run([CRIU, "--version"], capture_output=True, text=True).stdout.split()[1].split(".")
    if [int(part) for part in version[:2]] < [4, 2]:
        return False
    return subprocess.run([CRIU, "check"], capture_output=True).returncode == 0


needs_criu = pytest.mark.skipif(not _criu_works(), reason="needs CRIU 4.2 that works here; CRIU=PATH names one")
MOUNTED = r"""
// A tmpfs of its own with something in it, part of which is seen at another place as well.
int main(void) {
    CHECK(!mkdir("own", 0700) && !mkdir("part", 0700) && !mount("x", "own", "tmpfs", 0, "mode=711"));
    CHECK(!mkdir("own/below", 0700) && !mount("own/below", "part", 0, MS_BIND, 0));
    int fd = open("own/below/file", O_RDWR | O_CREAT, 0600);
    CHECK(write(fd, "kept", 4) == 4);
    set_up();
    char found[8] = "";
    int other = open("part/file", O_RDONLY);
    CHECK(other >= 0 && read(other, found, 8) == 4 && !strcmp(found, "kept") && pread(fd, found, 8, 0) == 4);
    return content();
}
"""
CLOCK = """
int main(void) {
    struct timespec now;
    set_up();
    CHECK(!clock_gettime(CLOCK_MONOTONIC, &now) && now.tv_sec > 5000000);
    return content();
}
"""
PROGRAMS = {"threads": THREADS, "kinds": KINDS, "shared": SHARED}


def _criu(directory: Path, *words: str | Path | int) -> None:
    log = directory / "criu.log"
    done = subprocess.run([CRIU, *map(str, words), "-D", directory, "-v4", "-o", log], timeout=120)
    assert not done.returncode, [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]


def _free(program: Program) -> None:
    program.process.poll()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in program.pids), "the pids are not free")


@needs_criu
@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_criu_restores_ours(tmp_path: Path, code: str) -> None:
    with running(tmp_path, compiled(tmp_path, code)) as program:
        images = program.dump()
        _free(program)
        _criu(images, "restore", "-d")
        program.finish()


@needs_criu
def test_criu_restores_our_chains(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, SHARED)) as program:
        for name, *parent in (("first",), ("second", "--parent", tmp_path / "first")):
            stasis("pre-dump", program.pid, "--images", tmp_path / name, *parent)
        images = program.dump("--parent", str(tmp_path / "second"))
        _free(program)
        _criu(images, "restore", "-d")
        program.finish()


@needs_criu
@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_we_restore_criu_s(tmp_path: Path, code: str) -> None:
    with running(tmp_path, compiled(tmp_path, code)) as program:
        images = tmp_path / "images"
        images.mkdir()
        program.pids = program.descendants()
        _criu(images, "dump", "-t", program.pid)
        _free(program)
        program.restore(images)
        program.finish()


def _mounted(directory: Path) -> list[str | Path]:
    """Words for a container: the first process leads a session, and its descriptors are of its own mounts."""
    program = compiled(directory, f"#include <sys/mount.h>\n{MOUNTED}")
    (directory / "errors").touch()
    return ["--mount", "--propagation", "slave", "setsid", "sh", "-c", f"exec {program} </dev/null >>errors 2>&1"]


@contextlib.contextmanager
def _root(directory: Path) -> Iterator[Path]:
    """Our root as a mount that CRIU takes for the root of a mount namespace."""
    directory.mkdir()
    subprocess.run(["mount", "--bind", "/", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@needs_criu
def test_criu_restores_our_mount_namespace(tmp_path: Path) -> None:
    with container(tmp_path, *_mounted(tmp_path)) as program, _root(tmp_path / "root") as root:
        images = program.dump()
        _criu(images, "restore", "-d", "--external", "mnt[]", "--root", root)
        program.finish()


@needs_criu
def test_we_restore_criu_s_mount_namespace(tmp_path: Path) -> None:
    with container(tmp_path, *_mounted(tmp_path)) as program:
        images = tmp_path / "images"
        images.mkdir()
        _criu(images, "dump", "-t", program.pid, "--external", "mnt[]")
        program.restore(images)
        program.finish()


def _mount(**values: Any) -> MntEntry:
    shown = {"mountpoint": "/data", "root": "/", "source": "/srv/data", "fstype": FsType.AUTO, **values}
    return MntEntry(mnt_id=7, root_dev=1, parent_mnt_id=1, flags=0, options="", **shown)


def test_mounts_are_told_as_criu_tells_them() -> None:
    """It wants names only of file systems that it has no number for, and a key of its own for mounts that it found."""
    mount = MountInfo(7, 1, (8, 1), "/", "/data", (), "ext4", "/dev/sda1", ())
    outside = mnt._entry(mnt.Plan(mount, mnt.Way.OUTSIDE, "/srv/data"))
    assert (outside.fsname, outside.ext_key, outside.ext_mount) == ("ext4", "CRIU:AUTOGENERATED", None)
    own = mnt._entry(mnt.Plan(mount._replace(fstype="tmpfs")))
    assert (own.fstype, own.fsname, own.ext_key, own.source) == (FsType.TMPFS, None, None, "/dev/sda1")
    older = _mount(ext_mount=True, ext_key="/srv/data")
    told = [outside, older, _mount(ext_key="name"), _mount(ext_mount=True, root="/srv/x"), own]
    assert list(map(mnt.outside_of, told)) == ["/srv/data", "/srv/data", "name", "/srv/x", ""]
    assert mnt.outside_of(_mount(mountpoint="/", fstype=FsType.UNSUPPORTED)) == mnt.ROOT


@pytest.mark.tool("unshare")
def test_clocks_are_where_criu_has_them_or_where_they_were(tmp_path: Path) -> None:
    """By the number of their namespace; older sets of ours have 0."""
    program = compiled(tmp_path, CLOCK)
    with container(tmp_path, "--time", "--monotonic", "5000000", program) as running_one:
        images = running_one.dump()
        (ids,) = _documents(images, f"ids-{running_one.pid}.img")["entries"]
        (images / f"timens-{ids['time_ns_id']}.img").rename(images / "timens-0.img")
        running_one.restore(images)
        running_one.finish()


def _documents(images: Path, name: str) -> dict[str, Any]:
    return dict(json.loads(stasis("decode", images / name)))


def _edit(images: Path, name: str, document: dict[str, Any]) -> None:
    edited = images / "edited"
    edited.write_text(json.dumps(document))
    stasis("encode", edited, "--output", images / name)
    edited.unlink()


def test_what_the_kernel_maps_is_told_as_criu_tells_it(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, THREADS)) as program:
        images = program.dump()
        (entry,) = _documents(images, f"mm-{program.pid}.img")["entries"]
        kinds = {vma["status"] & 0x100C: vma["status"] for vma in entry["vmas"] if vma["status"] & 0x100C}
        assert {kind: status for kind, status in kinds.items() if kind != 0x4} == {0x8: 0x209, 0x1000: 0x1201}
        assert kinds.get(0x4, 0x204) == 0x204
        assert sum(bool(vma["status"] & 0x1000) for vma in entry["vmas"]) == 1
        assert len(entry["mm_saved_auxv"]) <= 44


SEGMENT = r"""
#include <sys/shm.h>
int main(void) {
    int number = shmget(IPC_PRIVATE, 8192, 0600);
    char *memory = shmat(number, 0, 0);
    CHECK(number >= 0 && memory != MAP_FAILED);
    strcpy(memory + 5000, "kept");
    set_up();
    CHECK(!strcmp(memory + 5000, "kept") && !shmctl(number, IPC_RMID, 0));
    return content();
}
"""


def test_a_segment_is_shared_memory_to_criu(tmp_path: Path) -> None:
    """It attaches none whose status does not say so."""
    with container(tmp_path, "--ipc", compiled(tmp_path, SEGMENT)) as program:
        images = program.dump()
        (entry,) = _documents(images, f"mm-{program.pid}.img")["entries"]
        assert {vma["status"] for vma in entry["vmas"] if vma["status"] & 0x400} == {0x501}
        program.restore(images)
        program.finish()


@needs_criu
def test_criu_restores_our_segments(tmp_path: Path) -> None:
    with container(tmp_path, "--ipc", "setsid", compiled(tmp_path, SEGMENT)) as program:
        images = program.dump()
        _criu(images, "restore", "-d")
        program.finish()


def test_what_open_files_have_is_told_as_criu_tells_it(tmp_path: Path) -> None:
    """Its numbers for kinds of locks, filters from the highest bits on, pidfds without a way of access, and what the
    kernel tells of a timer that expired. Older sets of ours have the kernel's."""

    def set_up() -> list[int]:
        code = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 3))
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("=H6xQ", 1, ctypes.addressof(code)))
        held = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        fcntl.fcntl(held, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 100, 0, 0))  # F_OFD_SETLK
        leased = os.open(tmp_path / "leased", os.O_RDONLY | os.O_CREAT)
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        timer = timerfd.timerfd(1)
        timerfd.timerfd_settime(timer, 0, (3000, 0), (0, 1))
        select.select([timer], [], [])
        return [sock.detach(), os.pidfd_open(os.getpid()), leased, timer]

    def between() -> None:
        assert {lock["flag"] for lock in _documents(images, "filelocks.img")["entries"]} == {4, 8}
        document = _documents(images, "files.img")
        entries = {entry["type"]: entry for entry in document["entries"]}
        assert entries["INETSK"]["isk"]["opts"]["so_filter"] == [0x6000000000003]
        assert entries["PIDFD"]["pidfd"]["flags"] == 0
        entries["TIMERFD"]["tfd"]["vsec"] = 0
        _edit(images, "files.img", document)
        if older:
            entries["INETSK"]["isk"]["opts"]["so_filter"] = [0x300000006]
            _edit(images, "files.img", document)
            locks = _documents(images, "filelocks.img")
            for lock in locks["entries"]:
                lock["flag"] = {4: 1024, 8: 32}[lock["flag"]]
            _edit(images, "filelocks.img", locks)

    def verify(fds: list[int]) -> None:
        sock, _, leased, timer = fds
        assert sockopts._filter_of(socket.socket(fileno=sock)) == [0x6000000000003]
        assert fcntl.fcntl(leased, fcntl.F_GETLEASE) == fcntl.F_RDLCK
        assert os.read(timer, 8)[0] == 1
        assert re.search(r"it_value: \(29\d\d,", Path(f"/proc/self/fdinfo/{timer}").read_text())

    for older in (False, True):
        images = tmp_path / f"images-{older}"
        cycle(images, set_up, verify, between=between, options=FileOptions(file_locks=True))


def test_a_zombie_with_any_thread_and_a_vvar_in_pieces(tmp_path: Path) -> None:
    """What CRIU 4.2 writes for a zombie was never set; sets of ours from before have two pieces, without its status."""
    with running(tmp_path, compiled(tmp_path, THREADS)) as program:
        images = program.dump()
        tree = _documents(images, "pstree.img")
        for entry in tree["entries"]:
            entry["threads"] = entry["threads"] if entry["pid"] == program.pid else [2005389856]
        _edit(images, "pstree.img", tree)
        memory = _documents(images, f"mm-{program.pid}.img")
        memory["entries"][0]["vmas"] = _in_pieces(memory["entries"][0]["vmas"])
        _edit(images, f"mm-{program.pid}.img", memory)
        program.restore(images)
        program.finish()


def _in_pieces(vmas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for vma in vmas:
        if vma["status"] & 0x1000:
            middle = vma["start"] + 0x1000
            found += [{**vma, "end": middle, "status": 0x1001}, {**vma, "start": middle, "status": 0x1001}]
        else:
            found.append(vma)
    return found


@pytest.mark.tool("iptables")
def test_rules_of_iptables_go_with_the_restore(tmp_path: Path) -> None:
    """CRIU drops packets with them unless told otherwise; the connection came back, and nothing went through."""
    with server(tmp_path, ECHO, "127.0.0.1") as case:
        images = case.program.dump("--tcp", "established", "--network-lock", "skip")
        inventory = _documents(images, "inventory.img")
        inventory["entries"][0]["network_lock_method"] = 0
        _edit(images, "inventory.img", inventory)
        ours, theirs = case.client.getsockname(), case.client.getpeername()
        rules = [_rule("INPUT", ours, theirs), _rule("OUTPUT", theirs, ours)]
        for rule in rules:
            subprocess.run(["iptables", "-w", "-A", *rule], check=True)
        try:
            case.program.restore(images)
            gone = [subprocess.run(["iptables", "-w", "-C", *rule], capture_output=True).returncode for rule in rules]
            assert all(gone)
        finally:
            for rule in rules:
                subprocess.run(["iptables", "-w", "-D", *rule], capture_output=True)
        case.client.sendall(b"after")
        case.client.shutdown(socket.SHUT_WR)
        case.go()
        assert case.client.recv(100) == b"after"[::-1]


@pytest.mark.tool("iptables")
def test_rules_for_an_address_that_is_one_of_ipv4(tmp_path: Path) -> None:
    """As those of a Java virtual machine are: CRIU makes rules for the IPv4 address, and they stayed."""
    ours, theirs = ("127.0.0.1", 1), ("127.0.0.1", 2)
    mapped = [0, 0, 0xFFFF0000, 0x0100007F]
    found = minimal(InetSkEntry)
    found.family, found.src_port, found.dst_port, found.src_addr, found.dst_addr = socket.AF_INET6, 1, 2, mapped, mapped
    rules = [_rule("INPUT", theirs, ours), _rule("OUTPUT", ours, theirs)]
    for rule in rules:
        subprocess.run(["iptables", "-w", "-A", *rule], check=True)
    try:
        drop_rules(found)
        assert all(subprocess.run(["iptables", "-w", "-C", *rule], capture_output=True).returncode for rule in rules)
    finally:
        for rule in rules:
            subprocess.run(["iptables", "-w", "-D", *rule], capture_output=True)


def _rule(chain: str, source: tuple[str, int], target: tuple[str, int]) -> list[str]:
    return [
        chain, "-p", "tcp", "-m", "mark", "!", "--mark", "0xC114", "--source", source[0], "--sport", str(source[1]),
        "--destination", target[0], "--dport", str(target[1]), "-j", "DROP",
    ]  # fmt: skip


def test_a_call_that_cannot_run_is_an_error() -> None:
    """It was tried for ever: a process without its vdso, where the restore had found it laid out differently."""
    with counting() as process:
        ptrace.seize(process.pid)
        ptrace.interrupt(process.pid)
        ptrace.wait_for_stop(process.pid)
        thread = RemoteThread(process.pid)
        with pytest.raises(StasisError, match="cannot run a system call") as raised:
            thread.call(0x1000, "getpid")
        assert raised.value.errno == errno.EFAULT
        with contextlib.suppress(ProcessLookupError):
            process.kill()
