# SPDX-License-Identifier: Apache-2.0
"""Descriptors through a dump and a restore: a process sets them up, is dumped and ended, and another one gets them."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stasis.linux import process
from stasis.linux.clone3 import fork_as
from stasis.process.dump.ids import ObjectIds
from stasis.process.files.opening import FileSet
from stasis.process.files.options import FileOptions
from stasis.process.files.paths import Paths
from stasis.process.files.table import FileTable, check_descriptors
from stasis.process.findings import Finding, Findings
from stasis.process.images.imageset import ImageSet
from stasis.process.images.schema.inventory import InventoryEntry
from stasis.process.images.setwriter import ImageSetWriter
from stasis.process.tree import Tree
from tests.process.terminals import low_numbers_taken

__all__ = ["cycle", "findings_of", "make_child"]

Setup = Callable[[], Any]
Verify = Callable[[Any], None]
HIGH = 500


def _become(work: Callable[[], Any], told: int) -> NoReturn:
    """In a child: do the work, tell what came of it, and wait to be ended."""
    try:
        try:
            answer = ("ok", work())
        except BaseException:  # told to the test, which fails
            answer = ("failed", traceback.format_exc())
        os.write(told, pickle.dumps(answer))
        os.close(told)
        while True:
            signal.pause()
    finally:  # never back into the test
        os._exit(1)


def _start(work: Callable[[], Any], pid: int | None = None) -> tuple[int, Any]:
    """Do the work in a child with no descriptors but 0, 1, 2, which lives on. Returns its pid and what it told."""
    reader, writer = os.pipe()
    with low_numbers_taken() if pid is None else contextlib.nullcontext():  # a restore takes the numbers it needs
        child = os.fork() if pid is None else fork_as(pid)
        if child == 0:
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            told = os.dup2(writer, HIGH, inheritable=False)
            os.closerange(3, HIGH)
            _become(work, told)
        os.close(writer)
        with open(reader, "rb") as file:  # up to its end: the descriptor must not be there when the child is dumped
            kind, answer = pickle.loads(file.read())
    if kind == "failed":
        end(child)
        raise AssertionError(answer)
    return child, answer


def end(pid: int) -> None:
    """The processes that it made die with it, see `make_child`."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def make_child(work: Callable[[], Any]) -> int:
    """For a `set_up`: a child that does something and waits, and ends with its parent."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        process.set_parent_death_signal(signal.SIGKILL)
        os.close(HIGH)
        os.close(reader)
        work()
        os.close(writer)
        while True:
            signal.pause()
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return pid


def dump(pid: int, images: Path, options: FileOptions) -> list[Finding]:
    """Dump the descriptors of a tree; the findings, without a dump where there are any."""
    findings = Findings()
    with Tree(pid) as tree, ImageSetWriter(images) as out:
        tree.freeze()
        check_descriptors([task.pid for task in tree.tasks], findings, options)
        if len(findings):
            return list(findings)
        ids, table = ObjectIds(), FileTable(out, options)
        for task in tree.tasks:
            table.dump_descriptors(task.pid, ids.of(task.pid).files_id)
        table.finish()
        out.write("inventory", InventoryEntry(img_version=2, fdinfo_per_id=True))
        out.commit(durable=False)
    return []


def findings_of(set_up: Setup, images: Path, options: FileOptions | None = None) -> list[Finding]:
    """What stands in the way of dumping what `set_up` makes."""
    pid, _ = _start(set_up)
    try:
        return dump(pid, images, options or FileOptions())
    finally:
        end(pid)


def cycle(
    images: Path,
    set_up: Setup,
    *verify: Verify,
    options: FileOptions | None = None,
    between: Callable[[], None] = lambda: None,
    before: Callable[[int], None] = lambda pid: None,
) -> None:
    """Set descriptors up, dump them, end their process and restore them, with `between` done meanwhile; then call
    `verify` with what `set_up` returned. Of several, the first is for the first process's descriptors and the others
    are for those that it made."""
    chosen = options or FileOptions()
    pid, state = _start(set_up)
    try:
        before(pid)
        found = dump(pid, images, chosen)
        assert not found, [str(finding) for finding in found]
    finally:
        end(pid)
    between()
    restored, _ = _start(lambda: _restore(images, state, verify, chosen), pid)
    end(restored)


def _restore(images: Path, state: Any, verify: Sequence[Verify], options: FileOptions) -> None:
    opened = ImageSet.open(images)
    files = FileSet(opened, Paths(opened, str, str), options)
    tables = files.images.numbers("fdinfo")
    for files_id in tables:
        files.check(files_id)
    files.open_all(tables)
    for number, one in reversed(list(enumerate(verify))):
        if number == 0:
            _verify(files, tables[0], one, state)
        elif (pid := os.fork()) == 0:
            try:
                _verify(files, tables[number], one, state)
            except BaseException:  # the exit status tells
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        else:
            assert os.waitpid(pid, 0)[1] == 0, f"process {number} found something wrong"


def _verify(files: FileSet, files_id: int, verify: Verify, state: Any) -> None:
    files.set_owners(files_id)
    files.place(files_id, [HIGH])
    assert set(os.listdir("/proc/self/fd")) - {str(HIGH)} >= {"0", "1", "2"}
    verify(state)
