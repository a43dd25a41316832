# SPDX-License-Identifier: Apache-2.0
"""Requests of the transmission phase, and which of them the specification wants refused."""

from __future__ import annotations

import errno
from typing import NamedTuple

from stasis.nbd import protocol as p
from stasis.nbd.handshake import Session

__all__ = ["Command", "refusal"]


class Command(NamedTuple):
    """A request as it arrived; `position` is the index of its payload in the input buffer."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int
    position: int


_FLAGS = {
    p.NBD_CMD_READ: p.NBD_CMD_FLAG_DF,
    p.NBD_CMD_WRITE: 0,
    p.NBD_CMD_FLUSH: 0,
    p.NBD_CMD_TRIM: 0,
    p.NBD_CMD_CACHE: 0,
    p.NBD_CMD_WRITE_ZEROES: p.NBD_CMD_FLAG_NO_HOLE | p.NBD_CMD_FLAG_FAST_ZERO,
    p.NBD_CMD_BLOCK_STATUS: p.NBD_CMD_FLAG_REQ_ONE,
}
"""Flags a command may carry. FUA is allowed on all of them (proto.md, "Command flags")."""
_MODIFYING = frozenset({p.NBD_CMD_WRITE, p.NBD_CMD_TRIM, p.NBD_CMD_WRITE_ZEROES})
_ENOSPC_BEYOND_END = frozenset({p.NBD_CMD_WRITE, p.NBD_CMD_WRITE_ZEROES})


def refusal(session: Session, command: Command) -> int:
    """The errno with which a request must be refused (proto.md, "Error values"); 0 for one that may be tried.

    A length of zero is unspecified there; it is refused, so that no reply has to be made of nothing.
    """
    export = session.export
    flags, kind, _, offset, length, _ = command
    if kind not in _FLAGS or flags & ~(_FLAGS[kind] | p.NBD_CMD_FLAG_FUA):
        return errno.EINVAL
    if kind == p.NBD_CMD_FLUSH:
        return errno.EINVAL if offset or length else 0
    if export.read_only and kind in _MODIFYING:
        return errno.EPERM
    if not _offered(session, kind, flags) or not length or (offset | length) & (export.minimum_block - 1):
        return errno.EINVAL
    if offset + length > export.size:
        return errno.ENOSPC if kind in _ENOSPC_BEYOND_END else errno.EINVAL
    if length > export.maximum_block and kind in (p.NBD_CMD_READ, p.NBD_CMD_WRITE):
        return errno.EOVERFLOW if flags & p.NBD_CMD_FLAG_DF else errno.EINVAL
    return 0


def _offered(session: Session, kind: int, flags: int) -> bool:
    """Whether the transmission flags, or the negotiation, allow this command with these flags."""
    export = session.export
    if kind == p.NBD_CMD_READ:
        return session.structured or not flags & p.NBD_CMD_FLAG_DF
    if kind == p.NBD_CMD_TRIM:
        return export.can_trim
    if kind == p.NBD_CMD_CACHE:
        return export.can_cache
    if kind == p.NBD_CMD_WRITE_ZEROES:
        return export.can_zero and (export.can_fast_zero or not flags & p.NBD_CMD_FLAG_FAST_ZERO)
    if kind == p.NBD_CMD_BLOCK_STATUS:
        return bool(session.contexts)
    return True
