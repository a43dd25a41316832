# SPDX-License-Identifier: Apache-2.0
"""Names of unix sockets: abstract ones, and files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stasis.errors import BusyError
from stasis.linux.sockdiag import UnixSocket, unix_sockets
from stasis.process.files.descriptor import duplicate
from stasis.process.images.schema.sockets import FilePermsEntry, UnixSkEntry
from stasis.process.namespaces.identities import Identities
from stasis.process.roots import likely, mount_of, reach, where

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.kind import Opened

__all__ = ["bind", "directory_of", "file_perms", "mount_of_name", "reason_against", "standing"]

SIOCUNIXFILE = 0x89E0  # include/uapi/linux/un.h


def reason_against(found: UnixSocket, descriptor: Descriptor) -> str:
    """Why a socket could not be bound to its name again; "" where it can."""
    if not found.name or found.name.startswith(b"\0"):
        return ""
    if not found.name.startswith(b"/"):
        where = directory_of(found, descriptor)
        return "" if where else "it is bound to a relative path, and the directory is not known or the file was deleted"
    return "" if _status(found, descriptor) is not None else "the file that it is bound to was deleted"


def directory_of(found: UnixSocket, descriptor: Descriptor) -> str | None:
    """The directory that a relative name counts from; None for other names, or where it cannot be told. The kernel
    knows the file (unix(7)); for a name with `..` in it, it has to be the process's working directory."""
    if found.name[:1] in (b"", b"\0", b"/"):
        return None
    name = os.path.normpath(os.fsdecode(found.name.rstrip(b"\0")))
    file, _ = _file_of(descriptor)
    places = [file.removesuffix(f"/{name}") or "/"] if file.endswith(f"/{name}") else []
    places.append(os.readlink(f"/proc/{descriptor.pid}/cwd"))
    return next((place for place in places if _status(found, descriptor, place) is not None), None)


def _file_of(descriptor: Descriptor) -> tuple[str, int]:
    """The path of the file that a socket is bound to, and the mount; "" where we may not know (CAP_NET_ADMIN)."""
    sock = duplicate(descriptor)
    try:
        file = fcntl.ioctl(sock, SIOCUNIXFILE)
    except OSError:
        return "", 0
    finally:
        os.close(sock)
    try:
        return os.readlink(f"/proc/self/fd/{file}"), mount_of(file)
    finally:
        os.close(file)


def _status(found: UnixSocket, descriptor: Descriptor, directory: str = "/") -> os.stat_result | None:
    """The socket's file, if it has its name still."""
    path = os.path.join(directory, os.fsdecode(found.name.rstrip(b"\0")))
    order = likely(descriptor.pid)
    for place in order if len(order) == 1 else likely(descriptor.pid, _file_of(descriptor)[1]):
        with contextlib.suppress(OSError):
            status = os.stat(reach(path, place))
            if found.file is not None and status.st_ino & 0xFFFFFFFF == found.file[1]:
                return status
    return None


def mount_of_name(found: UnixSocket, descriptor: Descriptor, directory: str | None) -> int:
    """What a message says of the mount namespace in which its file is."""
    status = _status(found, descriptor, directory or "/") if found.name.startswith(b"/") or directory else None
    if status is None or len(likely(descriptor.pid)) == 1:
        return -1
    path = os.path.join(directory or "/", os.fsdecode(found.name.rstrip(b"\0")))
    return where(descriptor.pid, path, status, _file_of(descriptor)[1])


def file_perms(found: UnixSocket, descriptor: Descriptor, directory: str | None) -> FilePermsEntry | None:
    """Whom its file belongs to; None where it has none."""
    status = _status(found, descriptor, directory or "/") if found.name.startswith(b"/") or directory else None
    if status is None:
        return None
    inside = Identities.inside()
    return FilePermsEntry(mode=status.st_mode, uid=inside.uid(status.st_uid), gid=inside.gid(status.st_gid))


def bind(sock: socket.socket, entry: UnixSkEntry, opened: Opened) -> None:
    """Give a socket its name, in place of the file that the dumped one left. BusyError where another one has it."""
    if entry.name.startswith(b"\0"):
        sock.bind(entry.name)
        return
    path = os.fsdecode(entry.name.rstrip(b"\0"))
    with standing(entry, opened):
        path = path if entry.name_dir else opened.map_path(path)
        _make_way(path)
        sock.bind(path)
        if entry.file_perms is not None:
            os.chown(path, entry.file_perms.uid, entry.file_perms.gid)
            os.chmod(path, stat.S_IMODE(entry.file_perms.mode))


@contextmanager
def standing(entry: UnixSkEntry, opened: Opened) -> Iterator[None]:
    """Be in the mount namespace of a socket's name, and in the directory that a relative one counts from."""
    with opened.standing(entry.mnt_id):
        if not entry.name_dir:
            yield
            return
        before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.chdir(opened.map_path(entry.name_dir))
            yield
        finally:
            os.fchdir(before)
            os.close(before)


def _make_way(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    alive = {found.file[1] for found in unix_sockets().values() if found.file is not None}
    if not stat.S_ISSOCK(status.st_mode) or status.st_ino & 0xFFFFFFFF in alive:
        raise BusyError(f"{path}, which a process listened on, is in use", hint="end what uses it, or --map-path")
    os.unlink(path)
