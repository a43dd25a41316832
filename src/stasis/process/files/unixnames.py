# SPDX-License-Identifier: Apache-2.0
"""Names of unix sockets: abstract ones, and files."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable

from stasis.errors import BusyError
from stasis.linux.sockdiag import UnixSocket, unix_sockets
from stasis.process.images.schema.sockets import FilePermsEntry, UnixSkEntry
from stasis.process.namespaces.identities import Identities
from stasis.process.roots import reach

__all__ = ["bind", "file_perms", "reason_against"]


def reason_against(found: UnixSocket) -> str:
    """Why a socket could not be bound to its name again; "" where it can."""
    if not found.name or found.name.startswith(b"\0"):
        return ""
    if not found.name.startswith(b"/"):
        return "it is bound to a relative path, which is not supported yet"
    return "" if _status(found) is not None else "the file that it is bound to was deleted"


def _status(found: UnixSocket) -> os.stat_result | None:
    """The socket's file, if it has its name still."""
    try:
        status = os.stat(reach(os.fsdecode(found.name.rstrip(b"\0"))))
    except OSError:
        return None
    return status if found.file is not None and status.st_ino & 0xFFFFFFFF == found.file[1] else None


def file_perms(found: UnixSocket) -> FilePermsEntry | None:
    """Whom its file belongs to; None where it has none."""
    status = _status(found) if found.name.startswith(b"/") else None
    if status is None:
        return None
    inside = Identities.inside()
    return FilePermsEntry(mode=status.st_mode, uid=inside.uid(status.st_uid), gid=inside.gid(status.st_gid))


def bind(sock: socket.socket, entry: UnixSkEntry, map_path: Callable[[str], str]) -> None:
    """Give a socket its name, in place of the file that the dumped one left. BusyError where another one has it."""
    if entry.name.startswith(b"\0"):
        sock.bind(entry.name)
        return
    path = map_path(os.fsdecode(entry.name.rstrip(b"\0")))
    _make_way(path)
    sock.bind(path)
    if entry.file_perms is not None:
        os.chown(path, entry.file_perms.uid, entry.file_perms.gid)
        os.chmod(path, stat.S_IMODE(entry.file_perms.mode))


def _make_way(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    alive = {found.file[1] for found in unix_sockets().values() if found.file is not None}
    if not stat.S_ISSOCK(status.st_mode) or status.st_ino & 0xFFFFFFFF in alive:
        raise BusyError(f"{path}, which a process listened on, is in use", hint="end what uses it, or --map-path")
    os.unlink(path)
