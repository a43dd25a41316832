# SPDX-License-Identifier: Apache-2.0
"""What a module for a kind of open file offers: to tell its own, to check, to dump and to bring back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from stasis.process.files.descriptor import Descriptor
from stasis.process.findings import Findings
from stasis.process.images.damage import damaged
from stasis.process.images.imageset import ImageSet
from stasis.process.images.schema.files import FdTypes, FileEntry
from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["FileKind", "Opened", "Saving"]


class Saving(Protocol):
    """What a kind may use while it dumps."""

    out: ImageSetWriter

    def path_file(self, pid: int, link: str, flags: int) -> int:
        """Id of the file behind /proc/PID/LINK."""


class Opened(Protocol):
    """What a kind may use while it brings files back. `state` is each kind's own, and there for one restore."""

    images: ImageSet
    state: dict[type[FileKind], dict[int, Any]]

    def map_path(self, path: str) -> str:
        """Where a path of the image is to be looked for."""


class FileKind(ABC):
    """One kind. An instance lives for one dump or one restore."""

    type: ClassVar[FdTypes]
    field: ClassVar[str]
    """Name of the FileEntry's field for this kind."""

    def message_of(self, entry: FileEntry) -> Any:
        """The part of a file's entry that is for this kind. DamagedError where it is missing."""
        found = getattr(entry, self.field)
        if found is None:
            raise damaged("files.img", 0, f"file {entry.id} lacks what its kind {FdTypes(entry.type).name} needs")
        return found

    @abstractmethod
    def claims(self, descriptor: Descriptor) -> bool:
        """Whether a descriptor is of this kind."""

    def check(self, descriptor: Descriptor, findings: Findings) -> None:
        """Note why it cannot be kept, if it cannot."""

    @abstractmethod
    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry:
        """The message for an open file description; `fd` is a descriptor of ours for it, `number` its id."""

    def finish(self, saving: Saving) -> None:
        """All descriptors are dumped: write what is written once for all."""

    @abstractmethod
    def restore(self, entry: FileEntry, opened: Opened) -> int:
        """Make the description again, in the process that is to have it; a descriptor for it."""

    def done(self, opened: Opened) -> None:
        """All descriptors are there: give back what was kept for them."""
