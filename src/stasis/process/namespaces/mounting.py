# SPDX-License-Identifier: Apache-2.0
"""Making mount tables again, in the first process of a restore, or in a child of it where there are several.

Nothing of this may get out: a mount that shares with one outside would hand on what is mounted within. So copies of
mounts outside are made first, while they still share. Then we go into a mount namespace and make everything private
that we see. File systems that only the tree has are mounted there, and copied for every place where they are to be.
Each table is put together in a namespace that begins as a copy of the one before and is made private, too: on top of
its root, which it becomes; the old one goes. Only when all tables are there groups are joined.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from stasis.errors import StasisError, UnsupportedError
from stasis.linux.mountinfo import mount_table
from stasis.linux.namespaces import CLONE_NEWNS, join_fd, unshare
from stasis.linux.newmount import (
    Attributes,
    clone_tree,
    detach,
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
from stasis.process.namespaces.mnt import FLAGS, NEW, ROOT, SHARED, SLAVE, UNBINDABLE, outside_of

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.namespaces import MntEntry
    from stasis.process.namespaces.own import Settings

__all__ = ["Copies", "Tables", "root_path"]

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
        outside = outside_of(entry)
        hint = f"name another place for {outside} with --map-path" if outside else ""
        raise StasisError(f"the mount {entry.mountpoint} ({_kind(entry)}) cannot be made again: {error}", hint=hint,
                          errno=error.errno or 0) from error  # fmt: skip


def _kind(entry: MntEntry) -> str:
    return entry.fsname or NAMES.get(FsType(entry.fstype)) or FsType(entry.fstype).name.lower()


class Copies:
    """Of what is outside, by the numbers of mounts. `models` still share with the outside."""

    def __init__(self) -> None:
        self.made: dict[int, int] = {}
        self.models: dict[int, int] = {}

    @classmethod
    def of(cls, number: int, images: ImageSet, map_path: Callable[[str], str]) -> Copies:
        """Those for the table of an image; `map_path` says where paths outside are now."""
        copies = cls()
        for entry in ordered(images, number):
            _told(entry, lambda entry: copies._add(entry, map_path))
        return copies

    def _add(self, entry: MntEntry, map_path: Callable[[str], str]) -> None:
        """One to mount, and one as a model where it is to share with it."""
        outside = outside_of(entry)
        if not outside:
            return
        path = map_path(outside)
        path = "/" if path == ROOT else path
        self.made[entry.mnt_id] = clone_tree(path)
        set_attributes(self.made[entry.mnt_id], propagation=Attributes.PRIVATE)
        if not entry.internal_sharing and (entry.shared_id or entry.master_id):
            self.models[entry.mnt_id] = clone_tree(path)


def root_path(number: int, images: ImageSet) -> str:
    """Where the root of a mount namespace comes from outside; "" where it does not."""
    return outside_of(ordered(images, number)[0])


def ordered(images: ImageSet, number: int) -> list[MntEntry]:
    """The table of a namespace: parents first, the root at the beginning; what lies over the whole of a mount last of
    its children."""
    entries, path = images.messages("mountpoints", number), images.file_path("mountpoints", number)
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


class Tables:
    """Mount tables while they are made. Groups may have members in all of them."""

    def __init__(self, numbers: Sequence[int], images: ImageSet, settings: Settings) -> None:
        """`numbers`: of the namespaces, as the images have them."""
        self._images = images
        self._settings = settings
        self._tables = {number: ordered(images, number) for number in numbers}
        self._made: dict[int, int] = {}
        self._models: dict[int, int] = {}
        for number in numbers:
            copies = settings.copies.get(number) or Copies.of(number, images, settings.map_path)
            self._made.update(copies.made)
            self._models.update(copies.models)
        self._bases: dict[int, int] = {}
        """The first mount of each file system that only the tree has."""

    def make(self) -> dict[int, tuple[int, int]]:
        """Make them, and be in the last one. By number: a descriptor for the namespace, and one for its root."""
        import_all()
        unshare(CLONE_NEWNS)
        _be_private()
        for number, entry in self._entries():
            _told(entry, lambda entry: self._make_base(entry, number))  # noqa: B023
        for _, entry in self._entries():
            _told(entry, self._copy)
        for fd in reversed(self._bases.values()):
            os.fchdir(fd)
            detach(".")
        found = {number: self._put_together(number) for number in self._tables}
        self._join_groups({number: fd for number, (fd, _) in found.items()})
        for fd in {*self._made.values(), *self._models.values(), *self._bases.values()}:
            os.close(fd)
        return found

    def _entries(self) -> Iterator[tuple[int, MntEntry]]:
        return ((number, entry) for number, table in self._tables.items() for entry in table)

    def _make_base(self, entry: MntEntry, number: int) -> None:
        """Mount a file system anew, somewhere, so that it can be copied."""
        fstype = NAMES.get(FsType(entry.fstype))
        if entry.mnt_id in self._made or entry.root_dev in self._bases or fstype is None or entry.root != "/":
            return
        words = [word.partition("=") for word in entry.options.split(",") if word not in NOT_OPTIONS]
        options = {name: value if sign else None for name, sign, value in words}
        with self._settings.living_in(number):
            fd = self._bases[entry.root_dev] = new_filesystem(fstype, options, source=entry.source or "none")
        if fstype == "tmpfs":
            tmpfs.fill(self._images, entry.root_dev, fd)
        if (entry.sb_flags or 0) & FLAGS["ro"]:
            reconfigure(fd, "ro")
        move(fd, "/")

    def _copy(self, entry: MntEntry) -> None:
        if entry.mnt_id in self._made:
            return
        if entry.root_dev not in self._bases:
            raise UnsupportedError(f"the mount {entry.mountpoint} ({_kind(entry)}) cannot be made again")
        self._made[entry.mnt_id] = clone_tree(entry.root.strip("/"), at=self._bases[entry.root_dev])

    def _put_together(self, number: int) -> tuple[int, int]:
        unshare(CLONE_NEWNS)
        _be_private()
        entries = self._tables[number]
        by_number = {entry.mnt_id: entry for entry in entries}
        for entry in entries:
            _told(entry, lambda entry: self._attach(entry, by_number.get(entry.parent_mnt_id)))
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        make_root(self._made[entries[0].mnt_id])
        if len(mount_table()) != len(entries):
            raise StasisError("mounts from outside are in the way of those of the images", errno=errno.EBUSY)
        for entry in entries:
            _told(entry, self._set_flags)
        return namespace, os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _attach(self, entry: MntEntry, parent: MntEntry | None) -> None:
        fd = self._made[entry.mnt_id]
        if parent is None:
            move(fd, "/")
        else:
            move(fd, os.path.relpath(entry.mountpoint, parent.mountpoint) if entry.mountpoint != parent.mountpoint
                 else "", at=self._made[parent.mnt_id])  # fmt: skip

    def _set_flags(self, entry: MntEntry) -> None:
        on = sum(attribute for flag, attribute in ATTRIBUTES.items() if entry.flags & flag)
        if entry.flags & FLAGS["noatime"]:
            on |= Attributes.NOATIME
        elif not entry.flags & FLAGS["relatime"]:
            on |= Attributes.STRICTATIME
        off = sum(ATTRIBUTES.values()) & ~on | Attributes.ATIME_MASK
        set_attributes(self._made[entry.mnt_id], on=on, off=off)

    def _join_groups(self, namespaces: dict[int, int]) -> None:
        """Masters before their slaves, and of a group the mount first that shows most: the others may show less."""
        members: dict[int, int] = {}
        everyone = sorted(self._entries(), key=lambda found: len(found[1].root.rstrip("/")))
        waiting = [found for found in everyone if found[1].flags & (SHARED | SLAVE | UNBINDABLE)]
        groups = {entry.shared_id for _, entry in waiting if entry.shared_id}
        here = next(reversed(namespaces))
        while waiting:
            ready = [found for found in waiting if found[1].master_id in members or found[1].master_id not in groups]
            if not ready:
                raise damaged(self._images.file_path("mountpoints", here), 0, "mounts are each other's slaves")
            for number, entry in ready:
                here = _go(here, number, namespaces)
                _told(entry, lambda entry: self._join_group(entry, members))
            waiting = [found for found in waiting if found not in ready]
        _go(here, next(reversed(namespaces)), namespaces)

    def _join_group(self, entry: MntEntry, members: dict[int, int]) -> None:
        """A slave of a group becomes a member of it first. It never stays one: what is mounted in it would get out."""
        fd, peer = self._made[entry.mnt_id], members.get(entry.shared_id or 0)
        model = self._models.get(entry.mnt_id, members.get(entry.master_id or 0))
        if peer is not None:
            join_group(fd, peer)
        elif model is not None:
            join_group(fd, model)
            if entry.flags & SLAVE:
                set_attributes(fd, propagation=Attributes.SLAVE)
        if peer is None and entry.flags & SHARED:
            set_attributes(fd, propagation=Attributes.SHARED)
        if entry.flags & UNBINDABLE:
            set_attributes(fd, propagation=Attributes.UNBINDABLE)
        if entry.shared_id:
            members.setdefault(entry.shared_id, fd)


def _go(here: int, number: int, namespaces: dict[int, int]) -> int:
    """Be in another one of them; its number."""
    if here != number:
        join_fd(namespaces[number], CLONE_NEWNS)
    return number


def _be_private() -> None:
    """From here on nothing that we mount is seen outside."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        set_attributes(root, propagation=Attributes.PRIVATE, recursive=True)
    finally:
        os.close(root)
    if any(mount.shared for mount in mount_table()):
        raise StasisError("mounts of ours would be seen outside", errno=errno.EBUSY)
