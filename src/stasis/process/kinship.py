# SPDX-License-Identifier: Apache-2.0
"""Sessions and process groups: which can be made again, and by whom.

A session is inherited at birth or made by its leader, never joined. So a child has a session of its own, or that of
its parent, or the one that its parent had before it made its own; else its leader is dead, and a helper with the
leader's pid stands in for it until the child is born. A group can be joined as long as somebody is in it, and is led
by whoever has its number; a helper stands in for a dead leader, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Kin", "unmakeable"]


@dataclass(slots=True)
class Kin:
    """A process among its relatives."""

    pid: int
    sid: int
    pgid: int
    children: list[Kin] = field(default_factory=list)

    def walk(self) -> Iterator[Kin]:
        """This one and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def unmakeable(root: Kin) -> list[tuple[int, str]]:
    """Pid and reason of each process that cannot get its session or group back."""
    everyone = {kin.pid: kin for kin in root.walk()}
    found = list(_sessions(root, root.sid, everyone, {}))
    for kin in everyone.values():
        leader = everyone.get(kin.pgid)
        if leader is not None and leader.pgid != leader.pid:
            found.append((kin.pid, f"the process {leader.pid} that made its process group {kin.pgid} has left it"))
    return found


def _sessions(kin: Kin, born_in: int, everyone: dict[int, Kin], helped: dict[int, int]) -> Iterator[tuple[int, str]]:
    """`helped`: sessions of dead leaders, and below which process each is made."""
    for child in kin.children:
        inherited = child.sid if child.sid in (born_in, kin.sid) else kin.sid
        if child.sid not in (child.pid, born_in, kin.sid):
            inherited = child.sid
            if child.sid in everyone or helped.setdefault(child.sid, kin.pid) != kin.pid:
                yield child.pid, f"its session {child.sid} was not made by one of its ancestors"
        yield from _sessions(child, inherited, everyone, helped)
