# SPDX-License-Identifier: Apache-2.0
"""User namespaces (user_namespaces(7)): which users and groups inside are which outside. Images name all of them as
they are numbered inside.

The first process of a restore is made with the namespace. It is told its maps by the restorer, who has the right to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stasis.linux import procfs
from stasis.process.images.schema.namespaces import UidGidExtent, UsernsEntry
from stasis.process.namespaces.identities import Extent, Identities

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "give_maps", "make", "write"]


def check(root: int, findings: Findings) -> None:
    """Note what cannot be kept."""
    if root != 1:
        findings.add(root, "user namespace", "one without a pid namespace of its own cannot be made again")
    if procfs.read(root, "setgroups").strip() == b"deny":
        findings.add(root, "user namespace", "setgroups(2) was forbidden in it for good, and images cannot say so")
    found = Identities.of(root)
    if not found.uids or not found.gids:
        findings.add(root, "user namespace", "it has no users or groups yet")


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """Both maps."""
    found = Identities.of(root)
    out.write("userns", UsernsEntry(uid_map=_map(found.uids), gid_map=_map(found.gids)), number=number)
    return []


def _map(extents: list[Extent]) -> list[UidGidExtent]:
    return [UidGidExtent(first=extent.inner, lower_first=extent.outer, count=extent.length) for extent in extents]


def give_maps(pid: int, images: ImageSet, number: int) -> None:
    """In the restorer: say who is who in the new namespace of a process."""
    found: UsernsEntry = images.one("userns", number)
    for name, extents in (("uid_map", found.uid_map), ("gid_map", found.gid_map)):
        text = "".join(f"{extent.first} {extent.lower_first} {extent.count}\n" for extent in extents)
        procfs.write(pid, name, text)


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """It is there already."""
