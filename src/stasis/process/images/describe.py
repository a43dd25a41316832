# SPDX-License-Identifier: Apache-2.0
"""Open files, sockets and mappings in the words of a person."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from typing import Any, Final

from stasis.process.images import notation
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.schema.memory import VmaEntry
from stasis.process.images.schema.sockets import InetSkEntry, UnixSkEntry

__all__ = ["describe_file", "describe_mapping", "kind_of_file", "protection"]

_FAMILIES: Final = {2: "", 10: "6"}  # AF_INET, AF_INET6
_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 136: "udplite"}
_CONNECTED: Final = 1  # TCP_ESTABLISHED, which unix sockets use too

# A name for each bit of vma_entry.status, the most telling first.
_MAPPING_KINDS: Final = {
    0x8: "[vdso]", 0x1000: "[vvar]", 0x4: "[vsyscall]", 0x20: "[heap]", 0x2: "[stack]", 0x2000: "[aio]",
    0x400: "[sysv shared memory]", 0x800: "[socket]", 0x4000: "memfd", 0x8000: "[shadow stack]", 0x10000: "[guard]",
    0x20000: "[uprobes]", 0x100: "[shared]", 0x200: "",
}  # fmt: skip


def kind_of_file(entry: FileEntry) -> str:
    """One word for what an open file is."""
    words = {FdTypes.REG: "file", FdTypes.INETSK: "inet socket", FdTypes.UNIXSK: "unix socket",
             FdTypes.NETLINKSK: "netlink socket", FdTypes.PACKETSK: "packet socket", FdTypes.EVENTPOLL: "epoll",
             FdTypes.NS: "namespace", FdTypes.TUNF: "tun", FdTypes.EXT: "external"}  # fmt: skip
    return words.get(entry.type, entry.type.name.lower())


def describe_file(entry: FileEntry) -> str:
    """What an open file is, in a few words: its path, addresses, peer, counters."""
    for name, describe in _DESCRIPTIONS.items():
        value = getattr(entry, name)
        if value is not None:
            return describe(value)
    return ""


def _regular(file: Any) -> str:
    mode = {0: "read", 1: "write", 2: "read and write"}.get(file.flags & 3, "")
    return f"{file.name}, {mode}" + (f" at {file.pos}" if file.pos else "")


def _inet(socket: InetSkEntry) -> str:
    protocol = _PROTOCOLS.get(socket.proto, f"protocol {socket.proto} ") + _FAMILIES.get(socket.family, "?")
    state = _state(socket.state)
    here = f"{_address(socket.src_addr)}:{socket.src_port}"
    if not socket.dst_port:
        return f"{protocol} {here} {state}"
    return f"{protocol} {here} to {_address(socket.dst_addr)}:{socket.dst_port} {state}"


def _address(words: list[int]) -> str:
    if len(words) not in (1, 4):
        return "?"
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return f"[{address}]" if address.version == 6 else str(address)


def _state(state: int) -> str:
    return str(notation.text(InetSkEntry.fields_by_name["state"], state)).lower().replace("_", " ")


def _unix(socket: UnixSkEntry) -> str:
    kind = str(notation.text(UnixSkEntry.fields_by_name["type"], socket.type)).lower()
    name = socket.name.rstrip(b"\0")
    shown = name.replace(b"\0", b"@", 1).decode("utf-8", "backslashreplace") if name else "unnamed"
    peer = f", peer {socket.peer}" if socket.peer else ""
    return f"{kind} {shown}, socket {socket.ino}{peer} {_state(socket.state)}"


def _timer(timer: Any) -> str:
    if not (timer.vsec or timer.vnsec):
        return f"clock {timer.clockid}, not armed"
    return f"clock {timer.clockid}, fires in {timer.vsec}.{timer.vnsec // 1_000_000:03} s"


_DESCRIPTIONS: Final[dict[str, Callable[[Any], str]]] = {
    "reg": _regular,
    "isk": _inet,
    "usk": _unix,
    "pipe": lambda pipe: f"pipe {pipe.pipe_id}, {'write' if pipe.flags & 1 else 'read'} end",
    "fifo": lambda fifo: f"fifo {fifo.pipe_id}",
    "efd": lambda event: f"counter {event.counter}",
    "epfd": lambda poll: f"watches {', '.join(str(target.tfd) for target in poll.tfd) or 'nothing'}",
    "tfd": _timer,
    "sgfd": lambda signals: f"signals {signals.sigmask:#x}",
    "ify": lambda notify: f"{len(notify.wd)} watches",
    "ffy": lambda notify: f"{len(notify.mark)} marks",
    "tty": lambda tty: f"terminal {tty.tty_info_id:#x}",
    "memfd": lambda memory: f"memfd {memory.inode_id}",
    "pidfd": lambda process: f"process {process.nspid}",
    "nlsk": lambda socket: f"protocol {socket.protocol}, port {socket.portid}",
    "psk": lambda socket: f"protocol {socket.protocol:#x}, interface {socket.ifindex}",
    "nsf": lambda namespace: f"namespace {namespace.ns_id}",
    "tunf": lambda tun: tun.netdev or "",
}


def protection(vma: VmaEntry) -> str:
    """As in /proc/PID/maps: rwxp."""
    access = "".join(letter if vma.prot & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4)))
    return access + ("s" if vma.flags & 1 else "p")


def describe_mapping(vma: VmaEntry, paths: dict[int, str]) -> str:
    """What is mapped: a path of `paths` (by id in files.img), or what kind of memory it is."""
    if vma.status & 0xC0:  # VMA_FILE_PRIVATE, VMA_FILE_SHARED
        return paths.get(vma.shmid, "?")
    return next((name for bit, name in _MAPPING_KINDS.items() if vma.status & bit), "")
