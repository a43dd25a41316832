# SPDX-License-Identifier: Apache-2.0
"""What the set is as a whole: inventory.img, cgroup.img, apparmor.img, statistics."""

from __future__ import annotations

from stasis.process.images.message import (
    Message,
    OpenEnum,
    boolean,
    bytestring,
    enumeration,
    message,
    string,
    uint32,
    uint64,
)
from stasis.process.images.schema.tasks import TaskKobjIdsEntry

__all__ = [
    "AaNamespace",
    "AaPolicy",
    "ApparmorEntry",
    "CgControllerEntry",
    "CgMemberEntry",
    "CgSetEntry",
    "CgroupDirEntry",
    "CgroupEntry",
    "CgroupPerms",
    "CgroupPropEntry",
    "DumpStatsEntry",
    "InventoryEntry",
    "LsmType",
    "PluginsEntry",
    "RestoreStatsEntry",
    "StatsEntry",
]


class LsmType(OpenEnum):
    NO_LSM = 0
    SELINUX = 1
    APPARMOR = 2


class PluginsEntry(Message):
    plugins: list[str] = string(12, factory=list)


class InventoryEntry(Message):
    img_version: int = uint32(1)
    fdinfo_per_id: bool | None = boolean(2, default=None)
    root_ids: TaskKobjIdsEntry | None = message(3, TaskKobjIdsEntry, default=None)
    ns_per_id: bool | None = boolean(4, default=None)
    root_cg_set: int | None = uint32(5, default=None)
    lsmtype: LsmType | None = enumeration(6, LsmType, default=None)
    dump_uptime: int | None = uint64(8, default=None)
    pre_dump_mode: int | None = uint32(9, default=None)
    tcp_close: bool | None = boolean(10, default=None)
    network_lock_method: int | None = uint32(11, default=None)
    plugins_entry: PluginsEntry | None = message(12, PluginsEntry, default=None)
    dump_criu_run_id: str | None = string(13, default=None)
    allow_uprobes: bool | None = boolean(14, default=None)


class DumpStatsEntry(Message):
    freezing_time: int = uint32(1)
    frozen_time: int = uint32(2)
    memdump_time: int = uint32(3)
    memwrite_time: int = uint32(4)
    pages_scanned: int = uint64(5)
    pages_skipped_parent: int = uint64(6)
    pages_written: int = uint64(7)
    irmap_resolve: int | None = uint32(8, default=None)
    pages_lazy: int = uint64(9)
    page_pipes: int | None = uint64(10, default=None)
    page_pipe_bufs: int | None = uint64(11, default=None)
    shpages_scanned: int | None = uint64(12, default=None)
    shpages_skipped_parent: int | None = uint64(13, default=None)
    shpages_written: int | None = uint64(14, default=None)


class RestoreStatsEntry(Message):
    pages_compared: int = uint64(1)
    pages_skipped_cow: int = uint64(2)
    forking_time: int = uint32(3)
    restore_time: int = uint32(4)
    pages_restored: int | None = uint64(5, default=None)


class StatsEntry(Message):
    dump: DumpStatsEntry | None = message(1, DumpStatsEntry, default=None)
    restore: RestoreStatsEntry | None = message(2, RestoreStatsEntry, default=None)


class CgroupPerms(Message):
    mode: int = uint32(1)
    uid: int = uint32(2)
    gid: int = uint32(3)


class CgroupPropEntry(Message):
    name: str = string(1)
    value: str = string(2)
    perms: CgroupPerms | None = message(3, CgroupPerms, default=None)


class CgroupDirEntry(Message):
    dir_name: str = string(1)
    children: list[CgroupDirEntry] = message(2, None, factory=list)
    properties: list[CgroupPropEntry] = message(3, CgroupPropEntry, factory=list)
    dir_perms: CgroupPerms | None = message(4, CgroupPerms, default=None)


class CgControllerEntry(Message):
    cnames: list[str] = string(1, factory=list)
    dirs: list[CgroupDirEntry] = message(2, CgroupDirEntry, factory=list)
    is_threaded: bool | None = boolean(3, default=None)


class CgMemberEntry(Message):
    name: str = string(1)
    path: str = string(2)
    cgns_prefix: int | None = uint32(3, default=None)


class CgSetEntry(Message):
    id: int = uint32(1)
    ctls: list[CgMemberEntry] = message(2, CgMemberEntry, factory=list)


class CgroupEntry(Message):
    sets: list[CgSetEntry] = message(1, CgSetEntry, factory=list)
    controllers: list[CgControllerEntry] = message(2, CgControllerEntry, factory=list)


class AaPolicy(Message):
    name: str = string(1)
    blob: bytes = bytestring(2)


class AaNamespace(Message):
    name: str = string(1)
    policies: list[AaPolicy] = message(2, AaPolicy, factory=list)
    namespaces: list[AaNamespace] = message(3, None, factory=list)


class ApparmorEntry(Message):
    namespaces: list[AaNamespace] = message(1, AaNamespace, factory=list)
