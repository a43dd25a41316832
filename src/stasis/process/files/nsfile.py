# SPDX-License-Identifier: Apache-2.0
"""Descriptors of namespaces (/proc/PID/ns/NAME): those that the tree lives in, which are there at the restore, or are
made before files are opened."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stasis.errors import StateError
from stasis.linux.namespaces import FLAGS
from stasis.process.dump.ids import NAMESPACES
from stasis.process.files.kind import FileKind
from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdTypes, FileEntry, NsFileEntry
from stasis.process.spaces import lives_in

if TYPE_CHECKING:
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.kind import Looking, Opened, Saving
    from stasis.process.images.schema.common import FownEntry

__all__ = ["NamespaceFiles"]

NAMES = {flag: name for name, flag in FLAGS.items()}


class NamespaceFiles(FileKind):
    type = FdTypes.NS
    field = "nsf"

    def claims(self, descriptor: Descriptor) -> bool:
        return _name(descriptor.link) in NAMESPACES

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        name = _name(descriptor.link)
        theirs = os.stat(f"/proc/{descriptor.pid}/ns/{name}")
        if not os.path.samestat(theirs, descriptor.status) and not lives_in(name, descriptor.status.st_ino):
            looking.findings.add(descriptor.pid, descriptor.where, "it is a namespace that the tree does not live in")

    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        entry = NsFileEntry(id=number, ns_id=descriptor.status.st_ino & 0xFFFFFFFF,
                            ns_cflag=FLAGS[_name(descriptor.link)], flags=descriptor.flags)  # fmt: skip
        return FileEntry(type=FdTypes.NS, id=number, nsf=entry)

    def restore(self, entry: FileEntry, opened: Opened) -> int:
        found: NsFileEntry = self.message_of(entry)
        name = NAMES.get(found.ns_cflag)
        if name is None:
            raise damaged(opened.images.file_path("files"), 0, f"there is no namespace of the kind {found.ns_cflag:#x}")
        if (fd := opened.namespace(name, found.ns_id)) is not None:
            return fd
        tree = opened.images.messages("pstree")
        lived_in = opened.images.one("ids", tree[0].pid) if tree else opened.images.inventory.root_ids
        if found.ns_id != (getattr(lived_in, NAMESPACES[name], None) or found.ns_id):
            raise StateError(f"a process had a {name} namespace open that it did not live in",
                             hint="it cannot be found again")  # fmt: skip
        return os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def owner(self, entry: FileEntry, opened: Opened) -> FownEntry | None:
        return None


def _name(link: str) -> str:
    """Of what /proc calls net:[4026531840]."""
    name, _, rest = link.partition(":[")
    return name if rest.endswith("]") and name in FLAGS else ""
