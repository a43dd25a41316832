# SPDX-License-Identifier: Apache-2.0
"""Options that sockets of every family have (socket(7))."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

from stasis.errors import UnsupportedError
from stasis.linux import libc
from stasis.process.files.descriptor import duplicate
from stasis.process.images.schema.sockets import SkOptsEntry

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.findings import Findings

__all__ = ["check_filter", "options_of", "set_options"]

# include/uapi/asm-generic/socket.h
SO_ATTACH_FILTER = SO_GET_FILTER = 26
FILTER_PROGRAM = struct.Struct("=H6xQ")  # struct sock_fprog
LONGEST_FILTER = 4096  # BPF_MAXINSNS
INTERFACE_NAME_BYTES = 16
SO_NO_CHECK, SO_PASSSEC, SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_BUF_LOCK = 11, 34, 32, 33, 72
SWITCHES = {
    "reuseaddr": socket.SO_REUSEADDR, "so_priority": socket.SO_PRIORITY, "so_rcvlowat": socket.SO_RCVLOWAT,
    "so_mark": socket.SO_MARK, "so_passcred": socket.SO_PASSCRED, "so_passsec": SO_PASSSEC,
    "so_dontroute": socket.SO_DONTROUTE, "so_no_check": SO_NO_CHECK, "so_reuseport": socket.SO_REUSEPORT,
    "so_broadcast": socket.SO_BROADCAST, "so_keepalive": socket.SO_KEEPALIVE, "so_oobinline": socket.SO_OOBINLINE,
}  # fmt: skip
BOOLEAN = {name for name in SWITCHES if name not in ("so_priority", "so_rcvlowat", "so_mark", "so_oobinline")}
TIMEVAL = struct.Struct("qq")
LINGER = struct.Struct("ii")

_getsockopt = libc.libc.getsockopt
_getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
RETURNS = {0x06 << 16, 0x16 << 16}
"""BPF_RET with a constant or the accumulator, above the constant of an instruction in criu's form."""


def options_of(sock: socket.socket) -> SkOptsEntry:
    """The message for what is set on a socket."""
    send, receive = (TIMEVAL.unpack(sock.getsockopt(socket.SOL_SOCKET, name, TIMEVAL.size))
                     for name in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO))  # fmt: skip
    entry = SkOptsEntry(
        so_sndbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        so_rcvbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
        so_snd_tmo_sec=send[0], so_snd_tmo_usec=send[1], so_rcv_tmo_sec=receive[0], so_rcv_tmo_usec=receive[1],
    )  # fmt: skip
    for name, number in SWITCHES.items():
        value = _get(sock, number)
        if value:
            setattr(entry, name, bool(value) if name in BOOLEAN else value)
    on, seconds = LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER.size))
    entry.so_linger = seconds if on else None
    entry.so_buf_lock = _get(sock, SO_BUF_LOCK)
    entry.so_bound_dev = _bound_device(sock)
    entry.so_filter = _filter_of(sock)
    return entry


def check_filter(descriptor: Descriptor, findings: Findings) -> None:
    """Note a filter that cannot be read."""
    with socket.socket(fileno=duplicate(descriptor)) as sock:
        try:
            _filter_of(sock)
        except UnsupportedError:
            findings.add(descriptor.pid, descriptor.where, "it has an eBPF filter, which cannot be read")


def _bound_device(sock: socket.socket) -> str | None:
    try:
        name = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, INTERFACE_NAME_BYTES)
    except OSError:
        return None  # unix sockets of older kernels
    return os.fsdecode(name.rstrip(b"\0")) or None


def _filter_of(sock: socket.socket) -> list[int]:
    """The instructions of a classic BPF program; lengths count these, and not bytes. UnsupportedError for another."""
    length = ctypes.c_uint32(0)
    _call_filter(sock, None, length)
    if not length.value:
        return []
    found = (ctypes.c_uint64 * length.value)()
    _call_filter(sock, found, length)
    return [_turned(value) for value in found[: length.value]]


def _turned(instruction: int) -> int:
    """A struct sock_filter (code, jt, jf, k from the lowest bits on) as criu has it: from the highest on."""
    return (instruction & 0xFFFF) << 48 | (instruction >> 16 & 0xFF) << 40 | (instruction >> 24 & 0xFF) << 32 \
        | instruction >> 32  # fmt: skip


def _turned_back(instruction: int) -> int:
    return instruction >> 48 | (instruction >> 40 & 0xFF) << 16 | (instruction >> 32 & 0xFF) << 24 \
        | (instruction & 0xFFFFFFFF) << 32  # fmt: skip


def _call_filter(sock: socket.socket, into: ctypes.Array[ctypes.c_uint64] | None, length: ctypes.c_uint32) -> None:
    done = _getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, into, ctypes.byref(length))
    if done < 0 and ctypes.get_errno() == errno.EACCES:
        raise UnsupportedError(f"a socket (inode {os.fstat(sock.fileno()).st_ino}) has an eBPF filter, which cannot be "
                               "read", errno=errno.EACCES)  # fmt: skip
    libc.check(done, "getsockopt(SO_GET_FILTER)")


def _set_filter(sock: socket.socket, instructions: list[int]) -> None:
    if instructions[-1] >> 32 in RETURNS:  # which a program ends with; older sets of ours have it as the kernel has
        instructions = [_turned_back(value) for value in instructions]
    program = (ctypes.c_uint64 * len(instructions))(*instructions)
    raw = FILTER_PROGRAM.pack(len(instructions), ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, raw)


def _get(sock: socket.socket, number: int) -> int | None:
    """None where this family or kernel does not have the option."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, number)
    except OSError:
        return None


def set_options(sock: socket.socket, entry: SkOptsEntry) -> None:
    """Set on a socket what was set on another one."""
    # The kernel doubles the sizes that it is given.
    sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, entry.so_sndbuf // 2)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, entry.so_rcvbuf // 2)
    if entry.so_buf_lock is not None and _get(sock, SO_BUF_LOCK) is not None:
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, entry.so_buf_lock)
    for name, seconds, microseconds in (
        (socket.SO_SNDTIMEO, entry.so_snd_tmo_sec, entry.so_snd_tmo_usec),
        (socket.SO_RCVTIMEO, entry.so_rcv_tmo_sec, entry.so_rcv_tmo_usec),
    ):
        if seconds or microseconds:
            sock.setsockopt(socket.SOL_SOCKET, name, TIMEVAL.pack(seconds, microseconds))
    for field, number in SWITCHES.items():
        value = getattr(entry, field)
        if value is not None and value != _get(sock, number):
            sock.setsockopt(socket.SOL_SOCKET, number, int(value))
    if entry.so_bound_dev:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.fsencode(entry.so_bound_dev) + b"\0")
    if 0 < len(entry.so_filter) <= LONGEST_FILTER:
        _set_filter(sock, entry.so_filter)
    if entry.so_linger is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER.pack(1, entry.so_linger))
