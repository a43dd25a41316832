# SPDX-License-Identifier: Apache-2.0
"""Making a mount table again, in the first process of a restore, which then stands at its root.

Nothing of this may get out: a mount that shares with one outside would hand on what is mounted within. So copies of
mounts outside are made first, while they still share. Then everything that we see is made private, the table is put
together on top of our root and becomes it, the old one goes, and only then groups are joined.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stasis.errors import StasisError, UnsupportedError
from stasis.linux.mountinfo import mount_table
from stasis.linux.namespaces import CLONE_NEWNS, unshare
from stasis.linux.newmount import (
    Attributes,
    clone_tree,
    join_group,
    make_root,
    move,
    new_filesystem,
    reconfigure,
    set_attributes,
)
from stasis.process.images.damage import damaged
from stasis.process.images.schema.namespaces import FsType
from stasis.process.namespaces import tmpfs
from stasis.process.namespaces.imports import import_all
from stasis.process.namespaces.mnt import FLAGS, NEW, SHARED, SLAVE, UNBINDABLE

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.namespaces import MntEntry

__all__ = ["Copies", "make_table", "root_path"]

ATTRIBUTES = {
    FLAGS["ro"]: Attributes.RDONLY, FLAGS["nosuid"]: Attributes.NOSUID, FLAGS["nodev"]: Attributes.NODEV,
    FLAGS["noexec"]: Attributes.NOEXEC, FLAGS["nodiratime"]: Attributes.NODIRATIME,
    FLAGS["nosymfollow"]: Attributes.NOSYMFOLLOW,
}  # fmt: skip
NOT_OPTIONS = {"seclabel", "rw", "ro", ""}
NAMES = {number: name for name, number in NEW.items()}


def _told(entry: MntEntry, work: Callable[[MntEntry], None]) -> None:
    try:
        work(entry)
    except OSError as error:
        hint = "name another place for what was outside with --map-path" if entry.ext_mount else ""
        raise StasisError(f"the mount {entry.mountpoint} ({entry.fsname or entry.fstype}) cannot be made again: "
                          f"{error}", hint=hint, errno=error.errno or 0) from error  # fmt: skip


class Copies:
    """Of what is outside, by the numbers of mounts. `models` still share with the outside."""

    def __init__(self) -> None:
        self.made: dict[int, int] = {}
        self.models: dict[int, int] = {}

    @classmethod
    def of(cls, number: int, images: ImageSet, map_path: Callable[[str], str]) -> Copies:
        """Those for the table of an image; `map_path` says where paths outside are now."""
        copies = cls()
        for entry in _ordered(images.messages("mountpoints", number), images.file_path("mountpoints", number)):
            _told(entry, lambda entry: copies._add(entry, map_path))
        return copies

    def _add(self, entry: MntEntry, map_path: Callable[[str], str]) -> None:
        """One to mount, and one as a model where it is to share with it."""
        if not entry.ext_mount:
            return
        path = map_path(entry.ext_key or entry.root)
        self.made[entry.mnt_id] = clone_tree(path)
        set_attributes(self.made[entry.mnt_id], propagation=Attributes.PRIVATE)
        if not entry.internal_sharing and (entry.shared_id or entry.master_id):
            self.models[entry.mnt_id] = clone_tree(path)


def make_table(
    number: int, images: ImageSet, map_path: Callable[[str], str], copies: Copies | None
) -> None:
    """Go into a mount namespace with the table of an image. `copies`: where they had to be made by somebody else."""
    entries = _ordered(images.messages("mountpoints", number), images.file_path("mountpoints", number))
    import_all()
    unshare(CLONE_NEWNS)
    _Table(entries, images, copies or Copies.of(number, images, map_path)).make()


def root_path(number: int, images: ImageSet) -> str:
    """Where the root of a mount namespace comes from outside; "" where it does not."""
    entry = _ordered(images.messages("mountpoints", number), images.file_path("mountpoints", number))[0]
    return (entry.ext_key or entry.root) if entry.ext_mount else ""


def _ordered(entries: Sequence[MntEntry], path: str) -> list[MntEntry]:
    """Parents first, the root at the beginning; what lies over the whole of a mount last of its children."""
    below: dict[int, list[MntEntry]] = {}
    numbers = {entry.mnt_id for entry in entries}
    found = [entry for entry in entries if entry.parent_mnt_id not in numbers]
    if len(found) != 1 or len(numbers) != len(entries) or found[0].mountpoint != "/":
        raise damaged(path, 0, "the mounts are no tree")
    for entry in entries:
        below.setdefault(entry.parent_mnt_id, []).append(entry)
    for entry in found:
        found += sorted(below.get(entry.mnt_id, ()), key=lambda child: child.mountpoint == entry.mountpoint)
    if len(found) != len(entries):
        raise damaged(path, 0, "the mounts are no tree")
    return found


class _Table:
    """The mounts while they are made."""

    def __init__(self, entries: list[MntEntry], images: ImageSet, copies: Copies) -> None:
        self._entries = entries
        self._images = images
        self._by_number = {entry.mnt_id: entry for entry in entries}
        self._made, self._models = copies.made, copies.models
        self._bases: dict[int, int] = {}
        """The first mount of each file system that only the tree has."""

    def make(self) -> None:
        """All of it."""
        _be_private()
        for entry in self._entries:
            _told(entry, self._attach)
        make_root(self._made[self._entries[0].mnt_id])
        for entry in self._entries:
            _told(entry, self._set_flags)
        self._join_groups()
        for fd in (*self._made.values(), *self._models.values()):
            os.close(fd)

    def _attach(self, entry: MntEntry) -> None:
        if entry.mnt_id not in self._made:
            self._made[entry.mnt_id] = self._inside(entry)
        fd, parent = self._made[entry.mnt_id], self._by_number.get(entry.parent_mnt_id)
        if parent is None:
            move(fd, "/")
        else:
            move(fd, os.path.relpath(entry.mountpoint, parent.mountpoint) if entry.mountpoint != parent.mountpoint
                 else "", at=self._made[parent.mnt_id])  # fmt: skip

    def _inside(self, entry: MntEntry) -> int:
        """A new mount; or a copy of one that is there already."""
        if entry.root_dev in self._bases:
            return clone_tree(entry.root.strip("/") or ".", at=self._bases[entry.root_dev])
        fstype = NAMES.get(FsType(entry.fstype))
        if fstype is None or entry.root != "/":
            what = f"{entry.mountpoint} ({entry.fsname or entry.fstype})"
            raise UnsupportedError(f"the mount {what} cannot be made again")
        words = [word.partition("=") for word in entry.options.split(",") if word not in NOT_OPTIONS]
        options = {name: value if sign else None for name, sign, value in words}
        fd = self._bases[entry.root_dev] = new_filesystem(fstype, options, source=entry.source or "none")
        if fstype == "tmpfs":
            tmpfs.fill(self._images, entry.root_dev, fd)
        if (entry.sb_flags or 0) & FLAGS["ro"]:
            reconfigure(fd, "ro")
        return fd

    def _set_flags(self, entry: MntEntry) -> None:
        on = sum(attribute for flag, attribute in ATTRIBUTES.items() if entry.flags & flag)
        if entry.flags & FLAGS["noatime"]:
            on |= Attributes.NOATIME
        elif not entry.flags & FLAGS["relatime"]:
            on |= Attributes.STRICTATIME
        off = sum(ATTRIBUTES.values()) & ~on | Attributes.ATIME_MASK
        set_attributes(self._made[entry.mnt_id], on=on, off=off)

    def _join_groups(self) -> None:
        """Masters before their slaves."""
        members: dict[int, int] = {}
        waiting = [entry for entry in self._entries if entry.flags & (SHARED | SLAVE | UNBINDABLE)]
        groups = {entry.shared_id for entry in waiting if entry.shared_id}
        while waiting:
            ready = [entry for entry in waiting if entry.master_id in members or entry.master_id not in groups]
            if not ready:
                raise damaged(self._images.file_path("mountpoints", 0), 0, "mounts are each other's slaves")
            for entry in ready:
                _told(entry, lambda entry: self._join_group(entry, members))
            waiting = [entry for entry in waiting if entry not in ready]

    def _join_group(self, entry: MntEntry, members: dict[int, int]) -> None:
        fd = self._made[entry.mnt_id]
        model = self._models.get(entry.mnt_id, members.get(entry.shared_id or 0))
        master = members.get(entry.master_id or 0)
        if model is not None:
            join_group(fd, model)
        elif master is not None:
            join_group(fd, master)
        if entry.flags & SLAVE and not (entry.flags & SHARED and model is not None):
            set_attributes(fd, propagation=Attributes.SLAVE)
        if entry.flags & SHARED and model is None:
            set_attributes(fd, propagation=Attributes.SHARED)
        if entry.flags & UNBINDABLE:
            set_attributes(fd, propagation=Attributes.UNBINDABLE)
        if entry.shared_id:
            members.setdefault(entry.shared_id, fd)


def _be_private() -> None:
    """From here on nothing that we mount is seen outside."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        set_attributes(root, propagation=Attributes.PRIVATE, recursive=True)
    finally:
        os.close(root)
    if any(mount.shared for mount in mount_table()):
        raise StasisError("mounts of ours would be seen outside", errno=errno.EBUSY)
