# SPDX-License-Identifier: Apache-2.0
"""Mounts of all mount namespaces that a process lives in, and a way to open each one (proc_pid_mountinfo(5))."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stasis.linux import libc, process
from stasis.linux.mounts import unescape

__all__ = ["NamespaceMount", "all_mounts", "mount_id", "open_mount"]

DELETED = "//deleted"  # show_mountinfo in fs/proc_namespace.c, by way of seq_dentry's d_path


@dataclass(frozen=True)
class NamespaceMount:
    """A mount as the process `pid` sees it. root: the part of the file system that is shown; device: its st_dev.

    shared_options are those of the file system, "ro" or "rw" first.
    """

    pid: int
    mount_id: int
    device: int
    root: str
    target: str
    fstype: str
    source: str
    shared_options: str

    @property
    def read_only(self) -> bool:
        """Whether the file system as a whole is read-only."""
        return "ro" in self.shared_options.split(",")


def all_mounts() -> list[NamespaceMount]:
    """The mounts of every namespace, those of our own first. Needs root to see those of others."""
    found: list[NamespaceMount] = []
    for pid in _one_per_namespace():
        found += _mounts_of(pid)
    return found


def _one_per_namespace() -> Iterator[int]:
    seen: set[str] = set()
    for pid in [os.getpid(), *process.processes()]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            continue  # it ended, or is none of ours to look at
        if namespace not in seen:
            seen.add(namespace)
            yield pid


def _mounts_of(pid: int) -> list[NamespaceMount]:
    try:
        text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return []
    return [_parse(pid, line) for line in text.splitlines()]


def _parse(pid: int, line: str) -> NamespaceMount:
    before, _, behind = line.partition(" - ")
    mount, _, device, root, target = before.split(" ")[:5]
    fstype, source, options = behind.split(" ")[:3]
    major, minor = device.split(":")
    return NamespaceMount(pid, int(mount), os.makedev(int(major), int(minor)), unescape(root), unescape(target),
                          fstype, unescape(source), options)


def mount_id(fd: int) -> int:
    """The id of the mount that fd was opened through."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise libc.error(errno.ENOTSUP, "mnt_id", fd)


def open_mount(mount: NamespaceMount) -> int:
    """A descriptor on the file system of a mount, in whatever namespace that is.

    ESTALE if another mount lies over it by now or its namespace went; ENOENT if its mount point was removed.
    """
    where = f"/proc/{mount.pid}/root{mount.target.removesuffix(DELETED)}"
    # O_NONBLOCK: a file that is mounted upon may be a FIFO's neighbour; never wait.
    fd = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if mount_id(fd) != mount.mount_id:
            raise libc.error(errno.ESTALE, "open", where)
    except BaseException:
        os.close(fd)
        raise
    return fd
