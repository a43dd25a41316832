# SPDX-License-Identifier: Apache-2.0
"""Cgroup namespaces (cgroup_namespaces(7)): which groups their processes see as the roots. What is needed for it stands
with the groups (`process/cgroups.py`): how much of the path of a group is outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stasis.errors import StasisError
from stasis.linux import procfs
from stasis.linux.namespaces import FLAGS, unshare
from stasis.process.cgroups import enter, hierarchies, set_of

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.inventory import CgMemberEntry
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "make", "write"]


def check(root: int, findings: Findings) -> None:
    """All of it can be kept."""


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """It is written with the groups."""
    return []


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """A namespace whose roots are those groups: they are those that we are in at that moment."""
    members = [member for member in _members(chain[0], number) if member.cgns_prefix]
    for member in members:
        _enter(member.name, member.path[: member.cgns_prefix])
    unshare(FLAGS["cgroup"])
    for member in members:
        _enter(member.name, member.path)


def _members(images: ImageSet, number: int) -> list[CgMemberEntry]:
    """Where the first process was that lived in it."""
    first = next(pid for pid in images.numbers("ids") if images.one("ids", pid).cgroup_ns_id == number)
    wanted = set_of(images.one("core", first))
    sets = {found.id: found.ctls for entry in images.messages("cgroup") for found in entry.sets}
    return list(sets.get(wanted, ()))


def _enter(name: str, path: str) -> None:
    if problem := enter(procfs.SELF, name, path, hierarchies()):
        raise StasisError(f"the cgroup namespace cannot be made: {problem}", hint="make that group, or let it be empty")
