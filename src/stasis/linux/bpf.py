# SPDX-License-Identifier: Apache-2.0
"""bpf(2): maps, programs, links and pins (include/uapi/linux/bpf.h), by ctypes and without a library.

Every call raises OSError with the command's name: EPERM without CAP_BPF and CAP_PERFMON or under kernel lockdown,
ENOSYS for a kernel without bpf(2).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from stasis.linux import libc

__all__ = ["F_INNER_MAP", "F_MMAPABLE", "MAP_TYPE_ARRAY", "MAP_TYPE_ARRAY_OF_MAPS", "MAP_TYPE_HASH",
           "MAP_TYPE_PERCPU_ARRAY", "FunctionInfo",
           "ProgramInfo", "attach_raw", "create_map", "delete", "enable_run_time_statistics", "load_btf",
           "load_program", "lookup_all", "map_id", "map_memory", "open_pinned", "pin", "program_info",
           "program_of_link", "update"]

SYS_BPF = {"x86_64": 321, "aarch64": 280}

MAP_CREATE = 0
MAP_UPDATE_ELEM = 2
MAP_DELETE_ELEM = 3
PROG_LOAD = 5
OBJ_PIN = 6
OBJ_GET = 7
OBJ_GET_INFO_BY_FD = 15
RAW_TRACEPOINT_OPEN = 17
BTF_LOAD = 18
MAP_LOOKUP_BATCH = 24
ENABLE_STATS = 32

MAP_TYPE_HASH = 1
MAP_TYPE_ARRAY = 2
MAP_TYPE_PERCPU_ARRAY = 6
MAP_TYPE_ARRAY_OF_MAPS = 12

F_MMAPABLE = 1 << 10
F_INNER_MAP = 1 << 12

PROG_TYPE_TRACING = 26
TRACE_RAW_TP = 23

# struct bpf_attr of each command, as far as it is used; what follows counts as zero.
MAP_CREATE_ATTR = struct.Struct("<7I16s")
ELEMENT_ATTR = struct.Struct("<I4xQQQ")
PROG_LOAD_ATTR = struct.Struct("<IIQQIIQII16s4xIIIQIIQIII4x")
PATH_ATTR = struct.Struct("<QII")
INFO_ATTR = struct.Struct("<IIQ")
RAW_TRACEPOINT_ATTR = struct.Struct("<QI4x")
BTF_LOAD_ATTR = struct.Struct("<QQIII4x")
BATCH_ATTR = struct.Struct("<QQQQIIQQ")
STATS_ATTR = struct.Struct("<I")

INFO_SIZE = 256
INFO_ID = struct.Struct("<4xI")  # struct bpf_map_info: type, id
LINK_INFO_PROGRAM = struct.Struct("<8xI")  # struct bpf_link_info: type, id, prog_id
PROG_INFO_RUNS = struct.Struct("<4xI184xQQQ")  # struct bpf_prog_info: id; run_time_ns, run_cnt, recursion_misses

LOG_SIZE = 1 << 20
LICENSE = b"GPL\0"
"""The helpers that are used want nothing else, but programs of type tracing must say so."""


@dataclass(frozen=True)
class FunctionInfo:
    """Where a function begins (in instructions) and its FUNC type in the program's BTF: struct bpf_func_info."""

    instruction: int
    type_id: int


@dataclass(frozen=True)
class ProgramInfo:
    """What the kernel counts: runs and their time are 0 unless statistics are on; misses are always counted."""

    id: int
    run_time_ns: int
    runs: int
    misses: int
    """Events for which the program was not run, since it was running on that processor (Linux 5.12)."""


def _call(command: int, name: str, attr: bytes | bytearray, what: str | int | None = None) -> int:
    number = SYS_BPF.get(os.uname().machine)
    if number is None:
        raise libc.error(38, name, what)
    buffer = (ctypes.c_char * len(attr)).from_buffer(attr if isinstance(attr, bytearray) else bytearray(attr))
    return libc.check(libc.syscall(number, command, ctypes.addressof(buffer), len(attr), 0, 0, 0), name, what)


def _address(data: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(data)


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


# -- maps ---------------------------------------------------------------------------------------------


def create_map(kind: int, key: int, value: int, entries: int, *, flags: int = 0, inner: int = 0,
               name: str = "") -> int:
    """A new map with keys and values of so many bytes; returns its descriptor. ENOMEM, E2BIG."""
    attr = MAP_CREATE_ATTR.pack(kind, key, value, entries, flags, inner, 0, name.encode()[:15])
    return _call(MAP_CREATE, "BPF_MAP_CREATE", attr, name)


def update(fd: int, key: bytes, value: bytes) -> None:
    """Store an element. For a map of maps the value is a descriptor, and the call returns only when every program
    that ran at its beginning has ended (kernel commit 1ae80cf31938, Linux 4.20)."""
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    attr = ELEMENT_ATTR.pack(fd, _address(key_buffer), _address(value_buffer), 0)
    _call(MAP_UPDATE_ELEM, "BPF_MAP_UPDATE_ELEM", attr, fd)


def delete(fd: int, key: bytes) -> None:
    """Remove an element; ENOENT. Waits like `update`."""
    key_buffer = _buffer(key)
    _call(MAP_DELETE_ELEM, "BPF_MAP_DELETE_ELEM", ELEMENT_ATTR.pack(fd, _address(key_buffer), 0, 0), fd)


def lookup_all(fd: int, key: int, value: int, entries: int) -> list[tuple[bytes, bytes]]:
    """Every element of a hash map with room for `entries`, bucket by bucket (Linux 5.6): one that is there during the
    whole call is never left out, whatever else comes and goes."""
    keys, values = ctypes.create_string_buffer(key * entries), ctypes.create_string_buffer(value * entries)
    position = ctypes.create_string_buffer(8)
    attr = bytearray(BATCH_ATTR.pack(0, _address(position), _address(keys), _address(values), entries, fd, 0, 0))
    try:
        _call(MAP_LOOKUP_BATCH, "BPF_MAP_LOOKUP_BATCH", attr, fd)
    except FileNotFoundError:  # ENOENT: that was all
        pass
    count = BATCH_ATTR.unpack(attr)[4]
    all_keys, all_values = keys.raw[: key * count], values.raw[: value * count]
    return [(all_keys[i * key : (i + 1) * key], all_values[i * value : (i + 1) * value]) for i in range(count)]


def map_memory(fd: int, size: int) -> mmap.mmap:
    """The contents of an array that was made with F_MMAPABLE, shared with the programs."""
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


# -- programs -----------------------------------------------------------------------------------------


def load_btf(data: bytes) -> int:
    """Describe types to the kernel; returns a descriptor."""
    buffer = _buffer(data)
    return _call(BTF_LOAD, "BPF_BTF_LOAD", BTF_LOAD_ATTR.pack(_address(buffer), 0, len(data), 0, 0))


def load_program(code: bytes, name: str, target: int, btf: int, functions: Sequence[FunctionInfo]) -> int:
    """Load a program for the tracepoint whose `btf_trace_…` type in the kernel's BTF is `target`.

    OSError with the end of the verifier's log where it was turned down.
    """
    log = ctypes.create_string_buffer(1)
    try:
        return _load(code, name, target, btf, functions, log)
    except OSError as error:
        if error.errno not in (13, 22, 7):  # EACCES, EINVAL, E2BIG: the verifier's answers
            raise
        failed = error
    # Once more with the log: with it from the start, a log that is too small fails a good program.
    log = ctypes.create_string_buffer(LOG_SIZE)
    try:
        return _load(code, name, target, btf, functions, log)
    except OSError:
        said = log.value.decode(errors="replace").strip().splitlines()[-3:]
        failed.strerror = f"{failed.strerror}: {' '.join(said)}"
        raise failed from None


def _load(code: bytes, name: str, target: int, btf: int, functions: Sequence[FunctionInfo],
          log: ctypes.Array[ctypes.c_char]) -> int:
    instructions, license_text = _buffer(code), _buffer(LICENSE)
    infos = _buffer(b"".join(struct.pack("<II", info.instruction, info.type_id) for info in functions))
    wanted = len(log) > 1
    attr = PROG_LOAD_ATTR.pack(
        PROG_TYPE_TRACING, len(code) // 8, _address(instructions), _address(license_text),
        int(wanted), len(log) if wanted else 0, _address(log) if wanted else 0, 0, 0, name.encode()[:15],
        TRACE_RAW_TP, btf, 8, _address(infos), len(functions), 0, 0, 0, target, 0,
    )  # fmt: skip
    return _call(PROG_LOAD, "BPF_PROG_LOAD", attr, name)


def attach_raw(program: int) -> int:
    """Run a program at the tracepoint it was loaded for; ends when the link's last descriptor and pin are gone."""
    return _call(RAW_TRACEPOINT_OPEN, "BPF_RAW_TRACEPOINT_OPEN", RAW_TRACEPOINT_ATTR.pack(0, program), program)


def enable_run_time_statistics() -> int:
    """Have the kernel measure all programs as long as the returned descriptor is open (Linux 5.8)."""
    return _call(ENABLE_STATS, "BPF_ENABLE_STATS", STATS_ATTR.pack(0))


# -- pins and what is known ---------------------------------------------------------------------------


def pin(fd: int, path: str) -> None:
    """Give a map, program or link a name in a bpf file system. EEXIST; EPERM for a name with a dot in it."""
    name = _buffer(os.fsencode(path) + b"\0")
    _call(OBJ_PIN, "BPF_OBJ_PIN", PATH_ATTR.pack(_address(name), fd, 0), path)


def open_pinned(path: str) -> int:
    """The map, program or link of a name. FileNotFoundError."""
    name = _buffer(os.fsencode(path) + b"\0")
    return _call(OBJ_GET, "BPF_OBJ_GET", PATH_ATTR.pack(_address(name), 0, 0), path)


def _info(fd: int) -> bytes:
    info = ctypes.create_string_buffer(INFO_SIZE)
    _call(OBJ_GET_INFO_BY_FD, "BPF_OBJ_GET_INFO_BY_FD", INFO_ATTR.pack(fd, INFO_SIZE, _address(info)), fd)
    return info.raw


def map_id(fd: int) -> int:
    """The number of a map, which no other map of this boot has."""
    return int(INFO_ID.unpack_from(_info(fd))[0])


def program_of_link(fd: int) -> int:
    """The number of the program that a link runs."""
    return int(LINK_INFO_PROGRAM.unpack_from(_info(fd))[0])


def program_info(fd: int) -> ProgramInfo:
    """What the kernel counts of a program."""
    return ProgramInfo(*PROG_INFO_RUNS.unpack_from(_info(fd)))
