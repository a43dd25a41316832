# SPDX-License-Identifier: Apache-2.0
"""The numbers that image files begin with.

An image of today begins with COMMON (or SERVICE) and the magic of its kind. Images of format version 1, and
inventory.img of every version, begin with the magic of their kind alone.
"""

from __future__ import annotations

from typing import Final

__all__ = ["COMMON", "MAGICS", "NAMES", "SERVICE"]

COMMON: Final = 0x54564319
SERVICE: Final = 0x55105940

# By the names that crit prints. Most are the latitude and longitude of a town.
MAGICS: Final = {
    "INVENTORY": 0x58313116,
    "PSTREE": 0x50273030,
    "CORE": 0x55053847,
    "IDS": 0x54432030,
    "MM": 0x57492820,
    "PAGEMAP": 0x56084025,
    "FS": 0x51403912,
    "FDINFO": 0x56213732,
    "FILES": 0x56303138,
    "REMAP_FPATH": 0x59133954,
    "GHOST_FILE": 0x52583605,
    "PIPES_DATA": 0x56453709,
    "FIFO_DATA": 0x59333054,
    "SK_QUEUES": 0x56264026,
    "TCP_STREAM": 0x51465506,
    "TTY_INFO": 0x59453036,
    "TTY_DATA": 0x59413026,
    "FILE_LOCKS": 0x54323616,
    "SECCOMP": 0x64413049,
    "CGROUP": 0x59383330,
    "MEMFD_INODE": 0x48453499,
    "TIMENS": 0x43114433,
    "UTSNS": 0x54473203,
    "USERNS": 0x55474906,
    "PIDNS": 0x61157326,
    "IPC_VAR": 0x53115007,
    "IPCNS_SHM": 0x46283044,
    "IPCNS_MSG": 0x55453737,
    "IPCNS_SEM": 0x59573019,
    "MNTS": 0x55563928,
    "NETDEV": 0x57373951,
    "NETNS": 0x55933752,
    "APPARMOR": 0x59423047,
    "BPFMAP_FILE": 0x57506142,
    "BPFMAP_DATA": 0x64324033,
    "AUTOFS": 0x49353943,
    "BINFMT_MISC": 0x67343323,
    "CPUINFO": 0x61404013,
    "STATS": 0x57093306,
    "IRMAP_CACHE": 0x57004059,
    # Ours, which criu does not know.
    "STASIS_SEALS": 0x4C414553,
    "STASIS_DATAGRAMS": 0x4D524744,
    "STASIS_MQUEUES": 0x5145554D,
    "STASIS_IPCNS_MQ": 0x514D4E49,
    # Read, and no longer written: what they held lies in files.img, mm and core now.
    "REG_FILES": 0x50363636,
    "EXT_FILES": 0x59255641,
    "NS_FILES": 0x61394011,
    "EVENTFD_FILE": 0x44523722,
    "EVENTPOLL_FILE": 0x45023858,
    "EVENTPOLL_TFD": 0x44433746,
    "SIGNALFD": 0x57323820,
    "INOTIFY_FILE": 0x48424431,
    "INOTIFY_WD": 0x54562009,
    "FANOTIFY_FILE": 0x55096122,
    "FANOTIFY_MARK": 0x56506035,
    "TIMERFD": 0x50493712,
    "PIPES": 0x56513555,
    "FIFO": 0x58364939,
    "UNIXSK": 0x54373943,
    "INETSK": 0x56443851,
    "PACKETSK": 0x60454618,
    "NETLINK_SK": 0x58005614,
    "TTY_FILES": 0x59433025,
    "TUNFILE": 0x57143751,
    "PIDFD": 0x54435556,
    "VMAS": 0x54123737,
    "SIGACT": 0x55344201,
    "ITIMERS": 0x57464056,
    "POSIX_TIMERS": 0x52603957,
    "CREDS": 0x54023547,
    "RLIMIT": 0x57113925,
    "SIGNAL": 0x59255647,
}

NAMES: Final = {magic: name for name, magic in MAGICS.items()}
