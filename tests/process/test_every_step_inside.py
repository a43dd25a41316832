# SPDX-License-Identifier: Apache-2.0
"""Whichever process of a restore is killed, at whatever step: all is there and runs, or nothing is left. For what is
made by more than one process, or leaves traces outside of the tree: containers, links, descriptors that are brought,
memory that parent and child share."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from stasis.linux import procfs, sysvshm
from stasis.linux.mountinfo import mount_table
from stasis.process.files.options import FileOptions
from stasis.process.restore.job import RestoreOptions, restore
from tests.process.containers import container
from tests.process.injector import count_steps_of_all, kill_at
from tests.process.programs import Program, compiled, counts, goes_on, running, wait_for
from tests.process.test_containers_killed import _alone, _counts, _goes_on, _inside, _mounts, _settled
from tests.process.test_every_step import LONG
from tests.process.test_killed import FAMILY, settled

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), *([pytest.mark.timeout(7200)] if LONG else [])]

SAMPLE = 3
PATIENCE = 60.0

BROUGHT = r"""
// Counts in a file that lost its name and has another one, and has files without any, a System V segment, a pipe from
// outside, and memory that a child shares until it writes.
#include <sys/shm.h>
int main(void) {
    CHECK(!mkdir("here", 0700) && !mkdir("there", 0700));
    int file = open("here/counts", O_RDWR | O_CREAT, 0600), gone = open("here/gone", O_RDWR | O_CREAT, 0600);
    CHECK(!ftruncate(file, 4096) && !link("here/counts", "there/counts") && !unlink("here/counts"));
    CHECK(write(gone, "gone", 4) == 4 && !unlink("here/gone") && !symlink("there/counts", "counts"));
    CHECK(!mkdir("here/dir", 0700) && open("here/dir", O_RDONLY) > 0 && !rmdir("here/dir"));
    volatile long *counts = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    int segment = shmget(IPC_PRIVATE, 12321, IPC_CREAT | 0600);
    char *shared = shmat(segment, 0, 0);
    char *memory = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(!shmctl(segment, IPC_RMID, 0));
    strcpy(shared + 5000, "shared");
    memset(memory, 7, 1 << 20);
    pid_t child = fork();
    memory[child ? 0 : 4096] = 8;
    touch("ready");
    for (int at = child ? 0 : 3; access("go", F_OK); usleep(500)) for (int i = at; i < at + 3; i++) ++counts[i];
    for (int i = 0; i < 1 << 20; i++) CHECK(memory[i] == (i == (child ? 0 : 4096) ? 8 : 7));
    char text[9] = "", name[200];
    CHECK(!strcmp(shared + 5000, "shared") && pread(gone, text, 9, 0) == 4 && !strcmp(text, "gone"));
    sprintf(name, "/proc/self/fd/%d", gone);
    memset(name + 100, 0, 100);
    CHECK(readlink(name, name + 100, 99) > 0 && strstr(name + 100, "here/gone (deleted)"));
    if (!child) _exit(0);
    int status;
    CHECK(wait(&status) == child && !status && write(5, "brought", 7) == 7);
    return content();
}
"""


APART = r"""
// Parent and children in different namespaces; they count, and the memory between them is shared.
#include <sys/msg.h>
#include <sys/ipc.h>
int main(void) {
    int file = open("counts", O_RDWR | O_CREAT | O_TRUNC, 0600), number = 0;
    CHECK(!ftruncate(file, 4096));
    volatile long *counts = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    while (number < 2 && !fork()) {
        CHECK(!unshare(++number == 1 ? CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWCGROUP : CLONE_NEWNET | CLONE_NEWIPC));
        CHECK(number == 1 ? !sethostname("apart", 5) : msgget(7, IPC_CREAT | 0600) >= 0);
    }
    if (number == 2) touch("ready");
    while (access("go", F_OK)) { ++counts[2 * number]; ++counts[2 * number + 1]; usleep(500); }
    CHECK((msgget(7, 0) >= 0) == (number == 2));
    int status;
    if (number < 2) CHECK(wait(&status) > 0 && !status);
    return number ? 0 : content();
}
"""


def _steps(all_steps: dict[int, int], seed: int) -> Iterator[tuple[int, int]]:
    """(process, step): all of them, or a few."""
    found = [(process, step) for process, total in sorted(all_steps.items()) for step in range(1, total + 1)]
    draw = random.Random(seed)
    return iter(found if LONG else [draw.choice([one for one in found if one[0] == process])
                                    for process in draw.choices(sorted(all_steps), k=SAMPLE)])  # fmt: skip


def _left_behind(directory: Path) -> set[str]:
    """What a restore that failed could leave outside of its processes."""
    segments = {f"segment {one.id}" for one in sysvshm.segments().values() if one.size == 12321}
    top = next(mount.target for mount in mount_table() if mount.fstype == "cgroup2")
    found = (*directory.glob("*here/*"), *Path(top).glob("stasis-traces*"))
    return segments | {str(path) for path in found if not path.name.startswith(".stasis-link-")}


def _nothing_is_left(directory: Path, before: set[str], where: str) -> None:
    """The guardian may be at work still."""
    deadline = time.monotonic() + PATIENCE
    while left := _left_behind(directory) - before:
        assert time.monotonic() < deadline, f"{where}, and left {left}"
        time.sleep(0.01)


def kill_everybody(
    program: Program, seed: int, images: Path, work: Callable[[Path], object], dump_again: Callable[[], Path]
) -> None:
    """Kill the restore of a program that counts, and restore it in the end."""
    before_all = _left_behind(program.directory)
    all_steps = count_steps_of_all(lambda: work(images))
    for process, step in _steps(all_steps, seed):
        if os.path.exists(f"/proc/{program.pid}"):
            goes_on(program)
            shutil.rmtree(images)
            images = dump_again()
        where = f"process {process} was killed at step {step} of {all_steps[process]}"
        kill_at(step, lambda images=images: work(images), process)  # type: ignore[misc]
        before = counts(program.directory)
        wait_for(partial(settled, program, before), f"{where}: half of the tree is left")
        if not os.path.exists(f"/proc/{program.pid}"):
            _nothing_is_left(program.directory, before_all, where)
    if not os.path.exists(f"/proc/{program.pid}"):
        kill_at(0, lambda: work(images))  # in a process that ends, so that the program is no child of ours


@pytest.mark.tool("unshare")
def test_any_process_of_the_restore_of_a_container(tmp_path: Path, seed: int) -> None:
    mounts = _mounts()
    with container(tmp_path, "-pmiun", "--mount-proc", "sh", _alone(tmp_path)) as program:
        images = program.dump()
        all_steps = count_steps_of_all(lambda: restore(images))
        for process, step in _steps(all_steps, seed):
            if there := _inside(tmp_path):
                program.pid = min(there, key=lambda pid: int(procfs.status(pid)["NSpid"].split()[-1]))
                _goes_on(tmp_path)
                shutil.rmtree(images)
                images = program.dump()
            where = f"process {process} was killed at step {step} of {all_steps[process]}"
            kill_at(step, lambda images=images: restore(images), process)
            before = _counts(tmp_path)
            wait_for(partial(_settled, program, before), f"{where}: half of it is left")
            assert _mounts() == mounts, where
        if not _inside(tmp_path):
            program.restore(images)
        program.pid = min(_inside(tmp_path), key=lambda pid: int(procfs.status(pid)["NSpid"].split()[-1]))
        program.finish()


def test_any_process_of_the_restore_of_a_family(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled(tmp_path, FAMILY)) as program:
        kill_everybody(program, seed, program.dump(), restore, lambda: program.dump())
        goes_on(program)
        program.finish()


def test_any_process_of_the_restore_of_a_tree_in_different_namespaces(tmp_path: Path, seed: int) -> None:
    with running(tmp_path, compiled(tmp_path, APART)) as program:
        kill_everybody(program, seed, program.dump(), restore, lambda: program.dump())
        goes_on(program)
        program.finish()


def test_any_process_of_a_restore_that_leaves_traces_while_it_works(tmp_path: Path, seed: int) -> None:
    group = Path(next(mount.target for mount in mount_table() if mount.fstype == "cgroup2")) / "stasis-traces"
    (group / "below").mkdir(parents=True)
    old, new = os.pipe(), os.pipe()
    start = f"echo $$ > {group}/below/cgroup.procs; exec {compiled(tmp_path, BROUGHT)} 5>&{old[1]}"
    with running(tmp_path, "bash", "-c", f"{start} {old[0]}<&- {old[1]}>&-", pass_fds=old) as program:
        pipe = [""]

        def dumped() -> Path:
            pipe[0] = f"pipe:[{os.stat(f'/proc/{program.pid}/fd/5').st_ino}]"
            images = program.dump("--link-remap")
            _remove(group)
            return images

        def restored(images: Path) -> None:
            restore(images, RestoreOptions(files=FileOptions(inherited={pipe[0]: new[1]})))

        kill_everybody(program, seed, dumped(), restored, dumped)
        assert (group / "below/cgroup.procs").read_text().split()
        program.finish()
        assert os.read(new[0], 100) == b"brought"
    _remove(group)
    for fd in (*old, *new):
        os.close(fd)


def _remove(group: Path) -> None:
    for path in (group / "below", group):
        wait_for(lambda path=path: not (path / "cgroup.procs").read_text(), "the group is in use")  # type: ignore[misc]
        path.rmdir()
