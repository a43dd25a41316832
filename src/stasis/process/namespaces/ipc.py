# SPDX-License-Identifier: Apache-2.0
"""IPC namespaces (ipc_namespaces(7)): limits, semaphores, message queues with their messages, shared memory."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stasis.errors import StasisError
from stasis.linux import libc, procfs, sysvipc, sysvshm
from stasis.linux.namespaces import FLAGS, join, unshare
from stasis.linux.sysvipc import Object, Queue, Semaphores
from stasis.process.images.damage import damaged
from stasis.process.images.schema.ipc import IpcDescEntry, IpcMsg, IpcMsgEntry, IpcSemEntry, IpcVarEntry
from stasis.process.namespaces.identities import Identities
from stasis.process.namespaces.mqueues import check_queues, make_queues, write_queues

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "make", "remove_marked", "write"]

SYS_SHMAT, SYS_SHMDT = 30, 67
SHM_RDONLY = 0o10000
LARGEST_ID = (1 << 31) - 1
SYSTEM = Path("/proc/sys")
LIMITS = {
    "msg_ctlmax": "kernel/msgmax", "msg_ctlmnb": "kernel/msgmnb", "msg_ctlmni": "kernel/msgmni",
    "auto_msgmni": "kernel/auto_msgmni", "shm_ctlmax": "kernel/shmmax", "shm_ctlall": "kernel/shmall",
    "shm_ctlmni": "kernel/shmmni", "shm_rmid_forced": "kernel/shm_rmid_forced",
    "mq_queues_max": "fs/mqueue/queues_max", "mq_msg_max": "fs/mqueue/msg_max",
    "mq_msgsize_max": "fs/mqueue/msgsize_max", "mq_msg_default": "fs/mqueue/msg_default",
    "mq_msgsize_default": "fs/mqueue/msgsize_default",
}  # fmt: skip
"""Fields of the message, and where each is below /proc/sys, for the namespace of whoever asks."""
SEMAPHORE_LIMITS = SYSTEM / "kernel/sem"


def check(root: int, findings: Findings) -> None:
    """Note what cannot be kept."""
    check_queues(root, findings)


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """Everything of the namespace, which the caller has entered."""
    identities = Identities.inside()
    out.write("ipcns-var", _limits(), number=number)
    for found in sysvipc.semaphores():
        contents = sysvipc.values(found.object.id, found.size)
        entry = IpcSemEntry(desc=_desc(found.object, identities), nsems=found.size)
        out.image("ipcns-sem", number).append(entry, contents)
    for queue in sysvipc.queues():
        texts = list(sysvipc.messages(queue))
        message = IpcMsgEntry(desc=_desc(queue.object, identities), qbytes=queue.limit, qnum=queue.waiting)
        parts = [(IpcMsg(mtype=kind, msize=len(text)), text) for kind, text in texts]
        out.image("ipcns-msg", number).append(message, *parts)
    _write_segments(number, out, identities)
    write_queues(number, out, identities)
    return []


def _limits() -> IpcVarEntry:
    fields: dict[str, Any] = {name: _number(path) for name, path in LIMITS.items()}
    return IpcVarEntry(sem_ctls=[int(word) for word in SEMAPHORE_LIMITS.read_text().split()], **fields)


def _number(path: str) -> int:
    """0 where this kernel does not have it."""
    try:
        return int((SYSTEM / path).read_text())
    except FileNotFoundError:
        return 0


def _desc(found: Object, identities: Identities) -> IpcDescEntry:
    return IpcDescEntry(
        key=found.key & 0xFFFFFFFF, uid=identities.uid(found.uid), gid=identities.gid(found.gid),
        cuid=identities.uid(found.cuid), cgid=identities.gid(found.cgid), mode=found.mode, id=found.id,
    )  # fmt: skip


def _write_segments(number: int, out: ImageSetWriter, identities: Identities) -> None:
    """Through mappings of ours: nobody of the tree needs to have one."""
    from stasis.process.sysvshm import write_segments

    attached: dict[int, int] = {}
    try:
        for found in sysvshm.segments().values():
            attached[found.id] = libc.check(libc.syscall(SYS_SHMAT, found.id, 0, SHM_RDONLY, 0, 0, 0), "shmat")
        mappings = {mapping.start: mapping for mapping in procfs.mappings(os.getpid(), flags=False)}
        places = {which: (os.getpid(), mappings[start]) for which, start in attached.items()}
        write_segments(places, number, out, identities)
    finally:
        for start in attached.values():
            libc.syscall(SYS_SHMDT, start, 0, 0, 0, 0, 0)


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """A namespace with all that the images say is in it."""
    unshare(FLAGS["ipc"])
    images = chain[0]
    try:
        _set_limits(images.one("ipcns-var", number))
        for record in images.image("ipcns-sem", number) if images.has("ipcns-sem", number) else ():
            _make_semaphores(images, number, record)
        for record in images.image("ipcns-msg", number) if images.has("ipcns-msg", number) else ():
            _make_queue(images, number, record)
        make_queues(images, number)
    except OSError as error:
        raise StasisError(f"the IPC namespace cannot be filled: {error.strerror or error}",
                          errno=error.errno or 0) from error  # fmt: skip
    from stasis.process.sysvshm import make_segments

    make_segments(images, number, chain)


def _set_limits(wanted: IpcVarEntry) -> None:
    """Only what is not so already: not all may be written."""
    words = " ".join(str(value) for value in wanted.sem_ctls)
    if words.split() != SEMAPHORE_LIMITS.read_text().split():
        SEMAPHORE_LIMITS.write_text(words)
    for name, path in LIMITS.items():
        value = getattr(wanted, name)
        if value and _number(path) != value:
            (SYSTEM / path).write_text(str(value))


def _make_semaphores(images: ImageSet, number: int, record: Any) -> None:
    found: IpcSemEntry = record.message
    with images.image("ipcns-sem", number) as image:
        contents = image.read(record.parts[0])
    sysvipc.make_semaphores(Semaphores(_object(found.desc, images.file_path("ipcns-sem", number)), found.nsems),
                            contents)  # fmt: skip


def _make_queue(images: ImageSet, number: int, record: Any) -> None:
    found: IpcMsgEntry = record.message
    sysvipc.make_queue(Queue(_object(found.desc, images.file_path("ipcns-msg", number)), found.qnum, found.qbytes))
    with images.image("ipcns-msg", number) as image:
        for part in record.parts:
            sysvipc.send(found.desc.id, part.message.mtype, image.read(part))


def _object(desc: IpcDescEntry, path: str) -> Object:
    if desc.id > LARGEST_ID:
        raise damaged(path, 0, f"there is no object with the id {desc.id}")
    key = struct.unpack("<i", struct.pack("<I", desc.key))[0]
    return Object(key, desc.id, desc.mode, desc.uid, desc.gid, desc.cuid, desc.cgid)


def remove_marked(images: ImageSet, number: int, pid: int) -> None:
    """Segments of a namespace that were removed while they were in use go when nobody has them mapped any more. To be
    called when all processes have, from outside of the namespace, in which process `pid` lives."""
    from stasis.process.sysvshm import marked

    numbers = marked(images, number)
    if not numbers:
        return
    child = os.fork()
    if child == 0:
        status = 1
        try:
            join(f"/proc/{pid}/ns/ipc", FLAGS["ipc"])
            for number in numbers:
                sysvshm.remove(number)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise StasisError("segments of shared memory that were removed cannot be removed again", errno=errno.EIO)

