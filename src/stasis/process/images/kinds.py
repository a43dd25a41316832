# SPDX-License-Identifier: Apache-2.0
"""The kinds of image files: how each is called, with which magic it begins, and of which messages it consists.

A kind's name is the file name without its number: `core` for `core-17.img`. The modules of the schema are imported
when a message of theirs is needed first, so a small restore does not load what describes network devices.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Final, NamedTuple

from stasis.process.images.magics import MAGICS

if TYPE_CHECKING:
    from stasis.process.images.message import Message

__all__ = ["KINDS", "RAW", "Kind", "kind_of_magic", "parse_name", "schema_class"]

DECIMAL: Final = "decimal"
HEXADECIMAL: Final = "hexadecimal"

_LARGEST_ID: Final = (1 << 64) - 1


class Kind(NamedTuple):
    """A kind of image. `magic_name` is crit's name; `number` says how the number in the file name is written."""

    name: str
    magic_name: str
    message_path: str
    number: str = ""
    service: bool = False
    suffix: str = ".img"

    @property
    def magic(self) -> int:
        return MAGICS[self.magic_name]

    @property
    def message(self) -> type[Message]:
        """Class of its records; a pagemap's first record and a ghost's chunks are others, see container."""
        return schema_class(self.message_path)

    def file_name(self, number: int | None = None) -> str:
        """Name of the file with this number. Raises ValueError where a number is missing or out of place."""
        if (number is None) == bool(self.number):
            raise ValueError(f"images of the kind {self.name} {'need a' if self.number else 'have no'} number")
        digits = "" if number is None else f"-{number:x}" if self.number == HEXADECIMAL else f"-{number}"
        return f"{self.name}{digits}{self.suffix}"


@functools.cache
def schema_class(path: str) -> type[Message]:
    """The message class at `path`, as in "tasks.CoreEntry"."""
    module, _, name = path.partition(".")
    found: type[Message] = getattr(importlib.import_module(f"stasis.process.images.schema.{module}"), name)
    return found


def _kinds() -> dict[str, Kind]:
    single = {
        "inventory": ("INVENTORY", "inventory.InventoryEntry"),
        "pstree": ("PSTREE", "tasks.PstreeEntry"),
        "files": ("FILES", "files.FileEntry"),
        "remap-fpath": ("REMAP_FPATH", "files.RemapFilePathEntry"),
        "pipes-data": ("PIPES_DATA", "files.PipeDataEntry"),
        "fifo-data": ("FIFO_DATA", "files.PipeDataEntry"),
        "sk-queues": ("SK_QUEUES", "sockets.SkPacketEntry"),
        "tty-info": ("TTY_INFO", "terminals.TtyInfoEntry"),
        "tty-data": ("TTY_DATA", "terminals.TtyDataEntry"),
        "filelocks": ("FILE_LOCKS", "files.FileLockEntry"),
        "seccomp": ("SECCOMP", "tasks.SeccompEntry"),
        "cgroup": ("CGROUP", "inventory.CgroupEntry"),
        "memfd": ("MEMFD_INODE", "memory.MemfdInodeEntry"),
        "apparmor": ("APPARMOR", "inventory.ApparmorEntry"),
        "bpfmap-file": ("BPFMAP_FILE", "events.BpfmapFileEntry"),
        "bpfmap-data": ("BPFMAP_DATA", "events.BpfmapDataEntry"),
        "cpuinfo": ("CPUINFO", "registers.CpuinfoEntry"),
        "stasis-datagrams": ("STASIS_DATAGRAMS", "sockets.DatagramEntry"),
        "stasis-mqueues": ("STASIS_MQUEUES", "files.MqueueFileEntry"),
        # no longer written
        "reg-files": ("REG_FILES", "files.RegFileEntry"),
        "ext-files": ("EXT_FILES", "files.ExtFileEntry"),
        "ns-files": ("NS_FILES", "files.NsFileEntry"),
        "eventfd": ("EVENTFD_FILE", "events.EventfdFileEntry"),
        "eventpoll": ("EVENTPOLL_FILE", "events.EventpollFileEntry"),
        "eventpoll-tfd": ("EVENTPOLL_TFD", "events.EventpollTfdEntry"),
        "signalfd": ("SIGNALFD", "events.SignalfdEntry"),
        "inotify": ("INOTIFY_FILE", "events.InotifyFileEntry"),
        "inotify-wd": ("INOTIFY_WD", "events.InotifyWdEntry"),
        "fanotify": ("FANOTIFY_FILE", "events.FanotifyFileEntry"),
        "fanotify-mark": ("FANOTIFY_MARK", "events.FanotifyMarkEntry"),
        "timerfd": ("TIMERFD", "events.TimerfdEntry"),
        "pidfd": ("PIDFD", "events.PidfdEntry"),
        "pipes": ("PIPES", "files.PipeEntry"),
        "fifo": ("FIFO", "files.FifoEntry"),
        "unixsk": ("UNIXSK", "sockets.UnixSkEntry"),
        "inetsk": ("INETSK", "sockets.InetSkEntry"),
        "packetsk": ("PACKETSK", "sockets.PacketSockEntry"),
        "netlinksk": ("NETLINK_SK", "sockets.NetlinkSkEntry"),
        "tty": ("TTY_FILES", "terminals.TtyFileEntry"),
        "tunfile": ("TUNFILE", "files.TunfileEntry"),
    }
    numbered = {
        "core": ("CORE", "tasks.CoreEntry"),
        "ids": ("IDS", "tasks.TaskKobjIdsEntry"),
        "mm": ("MM", "memory.MmEntry"),
        "pagemap": ("PAGEMAP", "memory.PagemapEntry"),
        "pagemap-shmem": ("PAGEMAP", "memory.PagemapEntry"),
        "fs": ("FS", "tasks.FsEntry"),
        "fdinfo": ("FDINFO", "files.FdinfoEntry"),
        "timens": ("TIMENS", "namespaces.TimensEntry"),
        "utsns": ("UTSNS", "namespaces.UtsnsEntry"),
        "userns": ("USERNS", "namespaces.UsernsEntry"),
        "pidns": ("PIDNS", "namespaces.PidnsEntry"),
        "ipcns-var": ("IPC_VAR", "ipc.IpcVarEntry"),
        "ipcns-shm": ("IPCNS_SHM", "ipc.IpcShmEntry"),
        "ipcns-msg": ("IPCNS_MSG", "ipc.IpcMsgEntry"),
        "ipcns-sem": ("IPCNS_SEM", "ipc.IpcSemEntry"),
        "mountpoints": ("MNTS", "namespaces.MntEntry"),
        "netdev": ("NETDEV", "network.NetDeviceEntry"),
        "netns": ("NETNS", "network.NetnsEntry"),
        "autofs": ("AUTOFS", "namespaces.AutofsEntry"),
        "binfmt-misc": ("BINFMT_MISC", "namespaces.BinfmtMiscEntry"),
        "stasis-seals": ("STASIS_SEALS", "memory.SealEntry"),
        "stasis-ipcns-mq": ("STASIS_IPCNS_MQ", "ipc.MqueueEntry"),
        # no longer written
        "vmas": ("VMAS", "memory.VmaEntry"),
        "sigacts": ("SIGACT", "tasks.SaEntry"),
        "itimers": ("ITIMERS", "tasks.ItimerEntry"),
        "posix-timers": ("POSIX_TIMERS", "tasks.PosixTimerEntry"),
        "creds": ("CREDS", "tasks.CredsEntry"),
        "rlimit": ("RLIMIT", "tasks.RlimitEntry"),
        "signal-s": ("SIGNAL", "tasks.SiginfoEntry"),
        "signal-p": ("SIGNAL", "tasks.SiginfoEntry"),
    }
    hexadecimal = {
        "ghost-file": ("GHOST_FILE", "files.GhostFileEntry"),
        "tcp-stream": ("TCP_STREAM", "sockets.TcpStreamEntry"),
    }
    service = {
        "stats-dump": ("STATS", "inventory.StatsEntry"),
        "stats-restore": ("STATS", "inventory.StatsEntry"),
        "irmap-cache": ("IRMAP_CACHE", "events.IrmapCacheEntry"),
    }
    return {
        **{name: Kind(name, *rest) for name, rest in single.items()},
        **{name: Kind(name, *rest, number=DECIMAL) for name, rest in numbered.items()},
        **{name: Kind(name, *rest, number=HEXADECIMAL) for name, rest in hexadecimal.items()},
        **{name: Kind(name, *rest, service=True, suffix="") for name, rest in service.items()},
    }


KINDS: Final = _kinds()
"""Every kind, by name."""

RAW: Final = ("pages", "ifaddr", "route", "route6", "rule", "iptables", "ip6tables", "nftables")
"""Names of numbered files without header and records: `pages-1.img` is page after page."""


def parse_name(file_name: str) -> tuple[str, int | None] | None:
    """Kind and number of a file in an image directory; None for what is no image."""
    suffix = ".img" if file_name.endswith(".img") else ""
    stem = file_name.removesuffix(".img")
    kind = KINDS.get(stem)
    if kind is not None and not kind.number:
        return (stem, None) if suffix == kind.suffix else None
    name, _, digits = stem.rpartition("-")
    kind = KINDS.get(name)
    if suffix != ".img" or not (name in RAW or (kind is not None and kind.number)):
        return None
    number = _number(digits, 16 if kind is not None and kind.number == HEXADECIMAL else 10)
    return None if number is None else (name, number)


def _number(digits: str, base: int) -> int | None:
    """The number, or None where the digits are not just how that number is written."""
    try:
        number = int(digits, base)
    except ValueError:
        return None
    return number if digits == format(number, "x" if base == 16 else "d") and number <= _LARGEST_ID else None


_BY_MAGIC: Final = {kind.magic: kind for kind in reversed(KINDS.values())}


def kind_of_magic(magic: int) -> Kind | None:
    """The kind that a file with this magic has; where two share one, the first in KINDS."""
    return _BY_MAGIC.get(magic)
