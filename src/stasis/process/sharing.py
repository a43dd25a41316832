# SPDX-License-Identifier: Apache-2.0
"""Kernel objects that processes share because a clone said so: address spaces, descriptor tables, working directories,
signal handlers. Which of it can be made again, by whom, and in which order.

Nothing of it can be joined later. A process shares with the one that makes it, and can leave tables and directories
(unshare(2)). So one of them passes through all processes between those that share it, from the one at the top down,
and who does not have it in the end leaves it once its children are made. An address space cannot be left. The first
process that has it is made as all others; those that come beside it are made when its memory is there, by their parent
or a sibling (CLONE_PARENT), and only where that one has it, too. docs/design/process-sharing.md has the whole of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from stasis.linux.clone3 import CLONE_PARENT

__all__ = ["CLONE_FILES", "CLONE_FS", "CLONE_SIGHAND", "CLONE_VM", "NAMES", "PASSED", "Birth", "Member", "Sharing"]

# include/uapi/linux/sched.h
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800

NAMES = {"vm": "address space", "files": "descriptor table", "fs": "working directory", "sighand": "signal handlers"}
"""What the objects are called, by the beginnings of the fields of an image that has their ids."""
PASSED = {"files": CLONE_FILES, "fs": CLONE_FS}
"""What passes through processes that do not have it in the end."""


class Member:
    """A process among those that may share with it; `ids` by the names in NAMES, empty for the dead."""

    def __init__(
        self, pid: int, sid: int, pgid: int, ids: dict[str, int], children: Sequence[Member] = ()
    ) -> None:
        self.pid, self.sid, self.pgid = pid, sid, pgid
        self.ids = ids
        self.children = list(children)

    def walk(self) -> Iterator[Member]:
        """This one and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


class Birth:
    """How a process is made. `flags` of the clone that makes it, by `maker`; `passed`: by kind, the object that it
    begins with where that is another one's, too. `beside`: pid of the process whose address space it has, 0 for one
    that is made as a process of its own. `born_in`: its session then."""

    def __init__(self, maker: int = 0, flags: int = 0, beside: int = 0, born_in: int = 0) -> None:
        self.maker, self.flags, self.beside, self.born_in = maker, flags, beside, born_in
        self.passed: dict[str, int] = {}


class Sharing:
    """How all processes of a tree are made, by pid. `problems`: pid, object and reason of what cannot be made;
    `order`: of the children of a process, where it matters."""

    def __init__(self, root: Member) -> None:
        self.births: dict[int, Birth] = {}
        self.order: dict[int, list[int]] = {}
        self.problems: list[tuple[int, str, str]] = []
        self._everyone = list(root.walk())
        self._parents = {child.pid: one for one in self._everyone for child in one.children}
        self._first: dict[int, Member] = {}
        for one in self._everyone:
            if one.ids:
                self._first.setdefault(one.ids["vm"], one)
        self._own = [one for one in self._everyone if not self._is_beside(one)]
        self.is_any = self._has_any()
        self._sessions(root, root.sid)
        if self.is_any:
            for kind in PASSED:
                self._pass(kind)
            self._arrange()
            for one in self._everyone:
                self._check_own(one)
            self._check_beside()

    def owners(self, kind: str) -> dict[int, list[int]]:
        """Pids of the processes of their own that share an object of this kind in the end, by its id."""
        found: dict[int, list[int]] = {}
        for one in self._own:
            if one.ids:
                found.setdefault(one.ids[kind], []).append(one.pid)
        return {number: pids for number, pids in found.items() if len(pids) > 1}

    def _has_any(self) -> bool:
        living = [one for one in self._everyone if one.ids]
        return any(len({one.ids[kind] for one in living}) < len(living) for kind in NAMES)

    def _is_beside(self, one: Member) -> bool:
        """Decide by whom a process with the address space of an earlier one is made."""
        self.births[one.pid] = birth = Birth()
        parent = self._parents.get(one.pid)
        birth.maker = parent.pid if parent is not None else 0
        first = self._first[one.ids["vm"]] if one.ids else one
        if first is one:
            return False
        birth.beside, birth.flags = first.pid, CLONE_VM
        assert parent is not None
        if parent.ids and parent.ids["vm"] == one.ids["vm"]:
            return True
        elder = next(child for child in parent.children if child.ids.get("vm") == one.ids["vm"])
        if elder is one:
            self._problem(one, "vm", f"it is shared with process {first.pid}, neither its parent nor a sibling")
        birth.maker, birth.flags = elder.pid, CLONE_VM | CLONE_PARENT
        return True

    def _problem(self, one: Member, kind: str, reason: str) -> None:
        self.problems.append((one.pid, NAMES[kind], reason))

    def _sessions(self, one: Member, born_in: int) -> None:
        self.births[one.pid].born_in = born_in
        for child in one.children:
            self._sessions(child, one.sid if child.sid == child.pid else child.sid)

    # -- tables and directories, which pass through processes ---------------------------------------

    def _pass(self, kind: str) -> None:
        """What each process begins with: the one object that it or processes below it share with others."""
        total = Counter(one.ids[kind] for one in self._own if one.ids)
        below: dict[int, Counter[int]] = {}
        for one in reversed(self._own):
            mine = below.setdefault(one.pid, Counter())
            mine.update([one.ids[kind]] if one.ids else [])
            crossing = [number for number, count in mine.items() if count < total[number]]
            if len(crossing) > 1:
                self._problem(one, kind, "it and processes below it share several with other processes")
            elif crossing:
                self.births[one.pid].passed[kind] = crossing[0]
                self.births[one.pid].flags |= PASSED[kind]
            if (parent := self._parents.get(one.pid)) is not None:
                below.setdefault(parent.pid, Counter()).update(mine)

    def _arrange(self) -> None:
        """Order the children of each process so that it leaves everything only when nobody needs it any more."""
        for one in self._own:
            children = [child for child in one.children if self.births[child.pid].beside == 0]
            if any(self.births[child.pid].passed for child in children):
                self._arrange_children(one, children)

    def _arrange_children(self, one: Member, children: list[Member]) -> None:
        left: dict[tuple[int | None, ...], list[Member]] = {}
        for child in children:
            left.setdefault(self._steps(one, child), []).append(child)
        found: list[int] = []
        while left:
            following = next((steps for steps in left if not any(_must_wait(steps, others) for others in left)), None)
            if following is None:
                several = next(iter(left.values()))[0]
                self._problem(several, "files", "the processes that share theirs cannot be made in any order")
                return
            found += [child.pid for child in left.pop(following)]
        self.order[one.pid] = found

    def _steps(self, one: Member, child: Member) -> tuple[int | None, ...]:
        """When a child is made, as far as sessions, tables and directories are concerned; None where that is all the
        same. A process begins with what passes through it, then has what only its children share, then its own."""
        born_in, birth = self.births[one.pid].born_in, self.births[child.pid]
        mine = one.pid if one.sid == one.pid else born_in
        steps: list[int | None] = [None if mine == born_in else int(child.sid != born_in)]
        if birth.passed and child.sid not in (child.pid, born_in, mine):
            self._problem(child, next(iter(birth.passed)), "it is shared, and the leader of its session is dead")
        for kind in PASSED:
            begin, end = self.births[one.pid].passed.get(kind), one.ids.get(kind)
            number = birth.passed.get(kind)
            if number is not None and begin == end and number != begin:
                self._problem(child, kind, f"it is shared with siblings, and process {one.pid} has another one, "
                                           "which it shares with others")  # fmt: skip
            between = 1 + (number or 0)
            steps.append(None if number is None else 0 if number == begin else 1 << 32 if number == end else between)
        return tuple(steps)

    # -- processes with the address space of another one ---------------------------------------------

    def _check_own(self, one: Member) -> None:
        parent = self._parents.get(one.pid)
        if self.births[one.pid].beside or parent is None or not self.births[parent.pid].beside:
            return
        first = self.births[parent.pid].beside
        reason = f"it is process {parent.pid}, which has the address space of process {first}, and this one has not"
        self.problems.append((one.pid, "parent", reason))

    def _check_beside(self) -> None:
        known = {one.pid: one for one in self._everyone}
        beside = [one for one in self._everyone if self.births[one.pid].beside]
        made = [one for one in self._own if one.ids]
        for one in self._own:
            for what, leader in ("session", one.sid), ("process group", one.pgid):
                if leader in known and self.births[leader].beside:
                    reason = f"its leader {leader} has the address space of process {self.births[leader].beside}"
                    self.problems.append((one.pid, what, reason))
        for one in beside:
            self._make_beside(one, known[self.births[one.pid].maker], made)
            made.append(one)

    def _make_beside(self, one: Member, maker: Member, made: Sequence[Member]) -> None:
        birth = self.births[one.pid]
        for kind, flag in (("files", CLONE_FILES), ("fs", CLONE_FS), ("sighand", CLONE_SIGHAND)):
            if one.ids[kind] == maker.ids.get(kind):
                birth.flags |= flag
            elif other := next((other for other in made if other.ids[kind] == one.ids[kind]), None):
                self._problem(one, kind, f"it is shared with process {other.pid}, which does not make this one")
        if one.sid not in (one.pid, maker.sid):
            self.problems.append((one.pid, "session", f"it is not that of process {maker.pid}"))
        if one.pgid not in (one.pid, maker.pgid) and not any(one.pgid == other.pgid for other in made):
            self.problems.append((one.pid, "process group", "nobody else is in it, and its leader is dead"))


def _must_wait(steps: Sequence[int | None], others: Sequence[int | None]) -> bool:
    """Whether others have to be made first."""
    return any(other is not None and step is not None and other < step
               for step, other in zip(steps, others, strict=True))  # fmt: skip
