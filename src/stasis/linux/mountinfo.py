# SPDX-License-Identifier: Apache-2.0
"""The mount table of a process with all that it says (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from typing import NamedTuple

from stasis.linux import procfs
from stasis.linux.mounts import unescape

__all__ = ["DELETED", "MountInfo", "mount_table"]

DELETED = "//deleted"
"""Behind the root of a mount whose directory or file was removed (fs/proc_namespace.c, d_path)."""
OPTIONAL = re.compile(r"(shared|master|propagate_from):(\d+)|(unbindable)")


class MountInfo(NamedTuple):
    """A mount. `root`: the part of the file system that is shown; `flags`: its own; `options`: the file system's.
    `shared`, `master`: numbers of peer groups, 0 for none. `device` is (major, minor)."""

    number: int
    parent: int
    device: tuple[int, int]
    root: str
    target: str
    flags: tuple[str, ...]
    fstype: str
    source: str
    options: tuple[str, ...]
    shared: int = 0
    master: int = 0
    unbindable: bool = False


def mount_table(pid: int = procfs.SELF) -> list[MountInfo]:
    """The mounts that a process can see, in the order of the table."""
    text = procfs.read(pid, "mountinfo").decode(errors="surrogateescape")
    return [_parse(line) for line in text.splitlines()]


def _parse(line: str) -> MountInfo:
    before, _, behind = line.partition(" - ")
    number, parent, device, root, target, flags, *optional = before.split(" ")
    fstype, source, options = behind.split(" ", 2)
    major, minor = device.split(":")
    groups = {name: int(value) for name, value, _ in OPTIONAL.findall(" ".join(optional)) if name}
    return MountInfo(
        int(number), int(parent), (int(major), int(minor)), unescape(root), unescape(target), tuple(flags.split(",")),
        fstype, unescape(source), tuple(unescape(options).split(",")), groups.get("shared", 0), groups.get("master", 0),
        "unbindable" in optional,
    )  # fmt: skip
