# SPDX-License-Identifier: Apache-2.0
"""System V IPC objects and their limits, POSIX message queues."""

from __future__ import annotations

from stasis.process.images.message import Message, boolean, message, string, uint32, uint64

__all__ = [
    "IpcDescEntry",
    "IpcMsg",
    "IpcMsgEntry",
    "IpcSemEntry",
    "IpcShmEntry",
    "IpcVarEntry",
    "MqueueEntry",
]


class IpcDescEntry(Message):
    key: int = uint32(1)
    uid: int = uint32(2)
    gid: int = uint32(3)
    cuid: int = uint32(4)
    cgid: int = uint32(5)
    mode: int = uint32(6)
    id: int = uint32(7)


class IpcShmEntry(Message):
    desc: IpcDescEntry = message(1, IpcDescEntry)
    size: int = uint64(2)
    in_pagemaps: bool | None = boolean(3, default=None)
    hugetlb_flag: int | None = uint32(4, default=None)


class IpcSemEntry(Message):
    desc: IpcDescEntry = message(1, IpcDescEntry)
    nsems: int = uint32(2)


class IpcMsg(Message):
    mtype: int = uint64(1)
    msize: int = uint32(2)


class IpcMsgEntry(Message):
    desc: IpcDescEntry = message(1, IpcDescEntry)
    qbytes: int = uint32(2)
    qnum: int = uint32(3)


class IpcVarEntry(Message):
    sem_ctls: list[int] = uint32(1, factory=list)
    msg_ctlmax: int = uint32(2)
    msg_ctlmnb: int = uint32(3)
    msg_ctlmni: int = uint32(4)
    auto_msgmni: int = uint32(5)
    shm_ctlmax: int = uint64(6)
    shm_ctlall: int = uint64(7)
    shm_ctlmni: int = uint32(8)
    shm_rmid_forced: int = uint32(9)
    mq_queues_max: int = uint32(10)
    mq_msg_max: int = uint32(11)
    mq_msgsize_max: int = uint32(12)
    mq_msg_default: int | None = uint32(13, default=None)
    mq_msgsize_default: int | None = uint32(14, default=None)
    msg_next_id: int | None = uint32(15, default=None)
    sem_next_id: int | None = uint32(16, default=None)
    shm_next_id: int | None = uint32(17, default=None)


class MqueueEntry(Message):
    name: str = string(1)
    mode: int = uint32(2)
    uid: int = uint32(3)
    gid: int = uint32(4)
    maxmsg: int = uint32(5)
    msgsize: int = uint32(6)
    length: int = uint32(7)
