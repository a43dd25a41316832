# SPDX-License-Identifier: Apache-2.0
"""Users and groups as the user namespace of a tree numbers them (user_namespaces(7)): images have those numbers."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from stasis.linux import procfs

__all__ = ["Extent", "Identities"]

ALL = (1 << 32) - 1
OVERFLOW = 65534  # /proc/sys/kernel/overflowuid, what a namespace shows of those it has no number for


class Extent(NamedTuple):
    """`length` numbers from `inner` on are those from `outer` on outside."""

    inner: int
    outer: int
    length: int


class Identities:
    """What a namespace maps, as it is seen from ours."""

    def __init__(self, uids: list[Extent], gids: list[Extent]) -> None:
        self.uids = uids
        self.gids = gids

    @classmethod
    def of(cls, pid: int) -> Identities:
        """That of a process."""
        return cls(*([Extent(*map(int, line.split())) for line in procfs.read(pid, name).decode().splitlines()]
                     for name in ("uid_map", "gid_map")))  # fmt: skip

    _inside: ClassVar[Identities | None] = None

    @classmethod
    def use(cls, pid: int) -> None:
        """In a worker: users and groups are numbered as they are for this process from here on."""
        cls._inside = cls.of(pid)

    @classmethod
    def inside(cls) -> Identities:
        """What numbers have to be translated with; where nothing was said they stay as they are."""
        return cls._inside or cls([Extent(0, 0, ALL)], [Extent(0, 0, ALL)])

    def uid(self, outer: int) -> int:
        """The number of one of our users in there."""
        return _inner(self.uids, outer)

    def gid(self, outer: int) -> int:
        """The number of one of our groups in there."""
        return _inner(self.gids, outer)


def _inner(extents: list[Extent], outer: int) -> int:
    for extent in extents:
        if 0 <= outer - extent.outer < extent.length:
            return extent.inner + outer - extent.outer
    return OVERFLOW
