# SPDX-License-Identifier: Apache-2.0
"""Random messages of every class, and a small image set, for the tests of the codec."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from stasis.process.images import ImageSetWriter, PagemapWriter, schema
from stasis.process.images.message import Field, Message
from stasis.process.images.schema import files, memory, tasks
from stasis.process.images.schema.inventory import InventoryEntry
from stasis.process.images.schema.registers import ThreadInfoX86, UserX86FpregsEntry, UserX86RegsEntry

__all__ = ["CLASSES", "messages", "minimal", "write_set"]

CLASSES = sorted(
    (value for value in (getattr(schema, name) for name in schema.__all__) if issubclass(value, Message)),
    key=lambda cls: cls.__name__,
)

_BITS = {"uint32": (0, 32), "uint64": (0, 64), "fixed64": (0, 64), "int32": (31, 31), "int64": (63, 63),
         "sint32": (31, 31), "sint64": (63, 63)}  # fmt: skip

Known = Callable[[type[Message], Field], bool]


def _everything(cls: type[Message], field: Field) -> bool:
    return True


def _number(kind: str) -> st.SearchStrategy[int]:
    below, above = _BITS[kind]
    low, high = -(1 << below) if below else 0, (1 << above) - 1
    return st.one_of(st.integers(low, high), st.sampled_from([low, high, 0, 1, 127, 128]))


def _value(field: Field, known: Known, depth: int) -> st.SearchStrategy[Any]:
    if field.kind == "message":
        return messages(field.of, known, depth + 1)  # type: ignore[arg-type]
    if field.kind == "enum":
        return st.sampled_from([member for member in field.of if known(field.of, member)])  # type: ignore
    if field.kind == "string":
        return st.binary(max_size=12).map(os.fsdecode) if known is _everything else st.text("az/ é", max_size=12)
    if field.kind == "bytes":
        return st.binary(max_size=40)
    return st.booleans() if field.kind == "bool" else _number(field.kind)


def _field(field: Field, known: Known, depth: int) -> st.SearchStrategy[Any]:
    if field.repeated:
        return st.lists(_value(field, known, depth), max_size=0 if depth > 2 else 3)
    return _value(field, known, depth)


@functools.cache
def messages(cls: type[Message], known: Known = _everything, depth: int = 0) -> st.SearchStrategy[Any]:
    """Messages of a class; `known` can leave out optional fields, and members of enumerations."""
    usable = {name: field for name, field in cls.fields_by_name.items() if known(cls, field)}
    required = {name: _field(field, known, depth) for name, field in usable.items() if field.required}
    optional = {} if depth > 2 else {
        name: _field(field, known, depth) for name, field in usable.items() if not field.required}  # fmt: skip
    return st.fixed_dictionaries(required, optional=optional).map(lambda values: cls(**values))


def minimal(cls: type[Message]) -> Any:
    """A message with its required fields alone, all zero or empty."""
    message = cls()
    for name in cls.required_names:
        field = cls.fields_by_name[name]
        message.__dict__[name] = _zero(field)
    return message


def _zero(field: Field) -> Any:
    if field.kind == "message":
        return minimal(field.of)  # type: ignore[arg-type]
    if field.kind == "enum":
        return next(iter(field.of))  # type: ignore[arg-type]
    return {"string": "", "bytes": b"", "bool": False}.get(field.kind, 0)


def core(pid: int) -> tasks.CoreEntry:
    """A living task's core."""
    registers = ThreadInfoX86(clear_tid_addr=0x7F00, gpregs=minimal(UserX86RegsEntry),
                              fpregs=minimal(UserX86FpregsEntry))
    task = minimal(tasks.TaskCoreEntry)
    task.task_state, task.comm = 1, f"task{pid}"
    thread = tasks.ThreadCoreEntry(futex_rla=0, futex_rla_len=0, creds=minimal(tasks.CredsEntry))
    return tasks.CoreEntry(mtype=tasks.March.X86_64, thread_info=registers, tc=task, thread_core=thread)


def mapping(start: int, end: int, status: int, shmid: int = 0) -> memory.VmaEntry:
    """A readable and writable private mapping."""
    return memory.VmaEntry(start=start, end=end, pgoff=0, shmid=shmid, prot=3, flags=0x22, status=status, fd=-1)


def write_set(path: Path, *, parent: Path | None = None, pages: bytes = b"a") -> None:
    """A small set: task 7 with a child 8 that shares its descriptors; two pages of memory, a pipe with "hello"."""
    fown = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
    with ImageSetWriter(path) as out:
        out.write("inventory", InventoryEntry(img_version=2, fdinfo_per_id=True, ns_per_id=True,
                                              root_ids=minimal(tasks.TaskKobjIdsEntry)))
        out.write("pstree", tasks.PstreeEntry(pid=7, ppid=0, pgid=7, sid=7, threads=[7, 9]),
                  tasks.PstreeEntry(pid=8, ppid=7, pgid=7, sid=7, threads=[8]))
        for pid in (7, 8):
            _write_task(out, pid, pages)
        regular = files.RegFileEntry(id=1, flags=0o100002, pos=5, fown=files.FownEntry(**fown), name="/bin/x")
        pipe = files.PipeEntry(id=2, pipe_id=77, flags=1, fown=files.FownEntry(**fown))
        out.write("files", files.FileEntry(type=files.FdTypes.REG, id=1, reg=regular),
                  files.FileEntry(type=files.FdTypes.PIPE, id=2, pipe=pipe))
        out.write("fdinfo", files.FdinfoEntry(id=1, flags=0, type=files.FdTypes.REG, fd=0),
                  files.FdinfoEntry(id=2, flags=1, type=files.FdTypes.PIPE, fd=3), number=2)
        out.image("pipes-data").append(files.PipeDataEntry(pipe_id=77, bytes=5, size=65536), b"hello")
        if parent is not None:
            out.link_parent(parent)
        out.commit(durable=False)


def _write_task(out: ImageSetWriter, pid: int, pages: bytes) -> None:
    out.write("core", core(pid), number=pid)
    ids = minimal(tasks.TaskKobjIdsEntry)
    ids.files_id = 2
    out.write("ids", ids, number=pid)
    out.write("fs", tasks.FsEntry(cwd_id=1, root_id=1, umask=0o22), number=pid)
    address_space = minimal(memory.MmEntry)
    address_space.exe_file_id = 1
    address_space.vmas = [mapping(0x1000, 0x5000, 0x41, 1), mapping(0x10000, 0x12000, 0x221)]
    out.write("mm", address_space, number=pid)
    with PagemapWriter(out, pid) as pagemap:
        pagemap.add(0x1000, 1)
        pagemap.add(0x10000, 1)
        os.write(pagemap.fd, pages * 4096 + pages.upper() * 4096)
