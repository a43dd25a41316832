# SPDX-License-Identifier: Apache-2.0
"""Control groups of a tree (cgroups(7)): where its processes were, and putting them there again.

Only membership is kept, neither limits nor other properties. Who was in the groups of the dumper comes back in those of
the restorer; the others come back in the groups of the same name, which are made where they are missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from stasis.linux import procfs
from stasis.linux.namespaces import FLAGS
from stasis.linux.namespaces import join as enter_namespace
from stasis.process.dump.ids import NAMESPACES, Home, namespace_ids
from stasis.process.helpers import fork_helper, wait_for_helper
from stasis.process.traces import group_made

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.inventory import CgControllerEntry, CgMemberEntry
    from stasis.process.images.schema.tasks import CoreEntry
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.tree import Task

__all__ = ["GroupTable", "check_groups", "enter", "groups_of", "hierarchies", "join", "set_of"]

OUR_SET = 1
CGROUP = NAMESPACES["cgroup"]
NOTHING: Mapping[str, str] = MappingProxyType({})
FROZEN = {"cgroup.freeze": "1", "freezer.state": "FROZEN"}

Groups = tuple[tuple[str, str], ...]
"""(controllers, path) of each hierarchy; the second version's has no controllers in its name."""


def groups_of(pid: int, tid: int | None = None) -> Groups:
    """Where a process is, or one of its threads."""
    name = "cgroup" if tid is None else f"task/{tid}/cgroup"
    lines = procfs.read(pid, name).decode(errors="surrogateescape").splitlines()
    found = (line.split(":", 2) for line in lines)
    return tuple(sorted((controllers, path) for _, controllers, path in found))


def check_groups(task: Task, findings: Findings) -> None:
    """Note threads that are in other groups than their process."""
    own = groups_of(task.pid)
    for thread in task.threads:
        if thread.tid != task.pid and groups_of(task.pid, thread.tid) != own:
            findings.add(task.pid, f"thread {thread.tid}", "it is in other control groups than its process")


class GroupTable:
    """The sets of groups of a dump. The dumper's own is the first."""

    def __init__(self) -> None:
        home = Home.ids().get(CGROUP, 0)
        self._sets: dict[tuple[Groups, int], int] = {(groups_of(os.getpid()), home): OUR_SET}
        self._lives: dict[int, int] = {}

    def of(self, pid: int) -> int:
        """Number of the set that a process is in, which is another one in another cgroup namespace."""
        namespace = namespace_ids(pid).get(CGROUP, 0)
        self._lives.setdefault(namespace, pid)
        return self._sets.setdefault((groups_of(pid), namespace), len(self._sets) + 1)

    def write(self, out: ImageSetWriter) -> int:
        """Write the sets, where there is another one than the dumper's own; the number of that one."""
        if len(self._sets) == 1:
            return OUR_SET
        from stasis.process.images.schema.inventory import CgMemberEntry, CgroupEntry, CgSetEntry

        controllers = _controllers(groups for groups, _ in self._sets)

        tops = {namespace: _roots(pid) for namespace, pid in self._lives.items()}
        out.write("cgroup", CgroupEntry(sets=[
            CgSetEntry(id=number, ctls=[
                CgMemberEntry(name=name, path=path, cgns_prefix=_length(tops.get(space, {}).get(name, ""), path))
                for name, path in found
            ])
            for (found, space), number in self._sets.items()
        ], controllers=controllers))  # fmt: skip
        return OUR_SET


def _controllers(sets: Iterable[Groups]) -> list[CgControllerEntry]:
    """All groups by hierarchy, without their properties: CRIU restores nobody into one that is not listed."""
    from stasis.process.images.schema.inventory import CgControllerEntry, CgroupDirEntry

    paths: dict[str, dict[str, None]] = {}
    for groups in sets:
        for name, path in groups:
            paths.setdefault(name, {})[path.lstrip("/")] = None
    return [CgControllerEntry(cnames=[name], dirs=[CgroupDirEntry(dir_name=path) for path in found])
            for name, found in paths.items()]  # fmt: skip


def _roots(pid: int) -> dict[str, str]:
    """The groups that a process in a cgroup namespace of its own sees as roots, by the names of their hierarchies."""
    number = namespace_ids(pid).get("cgroup_ns_id")
    if number in (None, Home.ids().get("cgroup_ns_id")):
        return {}
    reader, writer = os.pipe()
    child = fork_helper()
    if child == 0:
        try:
            enter_namespace(f"/proc/{pid}/ns/cgroup", FLAGS["cgroup"])
            os.write(writer, procfs.read(pid, "cgroup"))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, errors="surrogateescape") as told:
        inner = {name: path for _, name, path in (line.split(":", 2) for line in told.read().splitlines())}
    wait_for_helper(child)
    return {name: path.removesuffix(inner[name].rstrip("/")) for name, path in groups_of(pid) if name in inner}


def _length(root: str, path: str) -> int | None:
    """How much of a path lies outside of what is seen as root."""
    return len(root) if root and (path == root or path.startswith(root.rstrip("/") + "/")) else None


def set_of(core: CoreEntry) -> int | None:
    """The number of the set of a process; criu has it with its first thread since it keeps groups of threads (3.18)."""
    for part in (core.tc, core.thread_core):
        if part is not None and part.cg_set is not None:
            return part.cg_set
    return None


def join(
    images: ImageSet, members: Iterable[tuple[int, int | None]], roots: Mapping[str, str] = NOTHING
) -> list[str]:
    """Put processes, (pid, set) of each, into their groups. Returns what did not succeed, in sentences: a process is
    then in the groups of the restorer. `roots`: by the names of controllers, "" for all others, the group that takes
    the place of the one that all of their groups were in."""
    ours = images.inventory.root_cg_set
    wanted = [(pid, number) for pid, number in members if number is not None and number != ours]
    if not wanted:
        return []
    sets = {found.id: found.ctls for entry in images.messages("cgroup") for found in entry.sets}
    tops = _tops(sets[number] for _, number in wanted if number in sets)
    places = hierarchies()
    here = dict(groups_of(os.getpid()))
    problems: dict[str, None] = {}
    for pid, number in wanted:
        for member in sets.get(number, ()):
            if member.path != here.get(member.name):
                path = _moved(member.name, member.path, tops.get(member.name, "/"), roots)
                problem = enter(pid, member.name, path, places)
                problems.update({problem: None} if problem else {})
    return list(problems)


def _tops(sets: Iterable[list[CgMemberEntry]]) -> dict[str, str]:
    """Of each hierarchy the innermost group that all are in."""
    found: dict[str, str] = {}
    for member in (member for members in sets for member in members if member.path.startswith("/")):
        found[member.name] = os.path.commonpath([found.get(member.name, member.path), member.path])
    return found


def _moved(name: str, path: str, top: str, roots: Mapping[str, str]) -> str:
    root = next((roots[each] for each in (*name.split(","), name.removeprefix("name="), "") if each in roots), None)
    if root is None or not path.startswith("/"):
        return path
    below = os.path.relpath(path, top)
    return root if below == "." else os.path.join(root, below)


def hierarchies() -> dict[str, str]:
    """Where each hierarchy is mounted, by its name in /proc/PID/cgroup."""
    found: dict[str, str] = {}
    for line in procfs.read(procfs.SELF, "mountinfo").decode(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2":
            found.setdefault("", fields.split()[4])
        elif kind == "cgroup":
            words = [word for word in options.split(",") if word not in ("rw", "ro", "xattr", "clone_children")]
            found.setdefault(",".join(words), fields.split()[4])
    return found


def enter(pid: int, name: str, path: str, places: dict[str, str]) -> str:
    """Put a process into one group; why not, or ""."""
    what = f"the control group {path} ({name or 'version 2'}) of process {pid}"
    if name not in places:
        return f"{what} is of a hierarchy that is not mounted here"
    if ".." in path.split("/") or not path.startswith("/"):
        return f"{what} is outside of what can be seen here"
    group = f"{places[name]}{path}"
    try:
        _make(group)
        if any(_holds(f"{group}/{file}", frozen) for file, frozen in FROZEN.items()):
            return f"{what} is frozen"
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write(str(pid))
    except OSError as error:
        return f"{what} cannot be entered: {error.strerror}"
    return ""


def _make(group: str) -> None:
    if not os.path.isdir(group):
        _make(os.path.dirname(group))
        group_made(group)
        os.makedirs(group, exist_ok=True)


def _holds(path: str, text: str) -> bool:
    try:
        with open(path) as file:
            return file.read().strip() == text
    except FileNotFoundError:
        return False
