# SPDX-License-Identifier: Apache-2.0
"""Who makes whom of processes that share something: a model of clone, unshare and setsid follows the plan, and ends up
with what was asked for, whenever the plan says that it can be made."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from stasis.process.sharing import CLONE_FILES, CLONE_FS, CLONE_SIGHAND, CLONE_VM, PASSED, Member, Sharing


@dataclass
class Made:
    """A process of the model: objects are whatever `new` gave."""

    objects: dict[str, object] = field(default_factory=dict)


def member(pid: int, files: int, fs: int, *children: Member, vm: int = 0, sighand: int = 0) -> Member:
    """One in the session of 1, with an address space of its own by default."""
    ids = {"vm": vm or 100 + pid, "files": files, "fs": fs, "sighand": sighand or vm or 100 + pid}
    return Member(pid, 1, 1, ids, list(children))


def followed(root: Member) -> dict[int, dict[str, object]] | None:
    """What all processes have when the plan was followed; None where it says that this cannot be."""
    sharing = Sharing(root)
    if sharing.problems:
        return None
    has: dict[int, dict[str, object]] = {root.pid: _new()}
    _own(root, sharing, has)
    for one in root.walk():
        birth = sharing.births[one.pid]
        if birth.beside:
            maker, flags = has[birth.maker], birth.flags
            kept = {"vm": CLONE_VM, "files": CLONE_FILES, "fs": CLONE_FS, "sighand": CLONE_SIGHAND}
            has[one.pid] = {**_new(), **{kind: maker[kind] for kind, flag in kept.items() if flags & flag}}
    return has


def _new() -> dict[str, object]:
    return {kind: object() for kind in ("vm", "files", "fs", "sighand")}


def _own(one: Member, sharing: Sharing, has: dict[int, dict[str, object]]) -> None:
    """As `restore/spawn.py` does it."""
    now = dict(sharing.births[one.pid].passed)
    children = {child.pid: child for child in one.children if not sharing.births[child.pid].beside}
    for pid in sharing.order.get(one.pid, list(children)):
        birth = sharing.births[pid]
        _leave(now, birth.passed, has[one.pid])
        has[pid] = {**_new(), **{kind: has[one.pid][kind] for kind, flag in PASSED.items() if birth.flags & flag}}
        _own(children[pid], sharing, has)
    _leave(now, {kind: one.ids[kind] for kind in PASSED}, has[one.pid])


def _leave(now: dict[str, int], wanted: dict[str, int], objects: dict[str, object]) -> None:
    for kind, number in wanted.items():
        if now.get(kind, number) != number:
            objects[kind] = object()
        now[kind] = number


@st.composite
def trees(draw: st.DrawFn) -> Member:
    """Small ones, in which much is shared."""
    number = draw(st.integers(2, 7))
    ids = st.integers(1, 3)
    members = [member(1, draw(ids), draw(ids), vm=draw(ids))]
    for pid in range(2, number + 1):
        child = member(pid, draw(ids), draw(ids), vm=draw(st.integers(1, 12)))
        draw(st.sampled_from(members)).children.append(child)
        members.append(child)
    return members[0]


@given(trees())
def test_a_plan_makes_what_was_asked_for(root: Member) -> None:
    has = followed(root)
    if has is None:
        return
    members = list(root.walk())
    assert has.keys() == {one.pid for one in members}
    for one in members:
        for other in members:
            for kind in one.ids:
                is_same = has[one.pid][kind] is has[other.pid][kind]
                assert is_same == (one.ids[kind] == other.ids[kind]), (one.pid, other.pid, kind)


@given(st.lists(st.integers(0, 3), max_size=8))
def test_a_plan_is_found_for_what_children_take_from_their_parent(flags: list[int]) -> None:
    children = [member(pid, 1 if flag & 1 else pid, 1 if flag & 2 else pid) for pid, flag in enumerate(flags, 2)]
    assert followed(member(1, 1, 1, *children)) is not None


def test_what_passed_through_a_process_that_left_it_is_found() -> None:
    assert followed(member(1, 1, 1, member(2, 2, 1, member(3, 1, 2)))) is not None
    siblings = [member(3, 9, 9), member(4, 8, 8), member(5, 9, 9), member(6, 8, 8)]
    assert followed(member(1, 1, 1, *siblings)) is not None
    assert followed(member(1, 1, 1, member(2, 2, 2, *siblings), member(7, 1, 1))) is not None
    assert followed(member(1, 1, 1, member(2, 1, 1, *siblings))) is None, "what it shares it cannot leave and have"
