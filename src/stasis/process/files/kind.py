# SPDX-License-Identifier: Apache-2.0
"""What a module for a kind of open file offers: to tell its own, to check, to dump and to bring back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from stasis.process.images.damage import damaged
from stasis.process.images.schema.files import FdinfoEntry, FdTypes, FileEntry, RegFileEntry

if TYPE_CHECKING:
    from stasis.process.files.connections import Connections
    from stasis.process.files.descriptor import Descriptor
    from stasis.process.files.ghosts import GhostWriter
    from stasis.process.files.options import FileOptions
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.schema.common import FownEntry
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["FileKind", "Looking", "Opened", "Saving"]


class Looking(Protocol):
    """What a kind may use while it checks."""

    findings: Findings
    descriptors: list[Descriptor]
    """Of all processes, those that are on their way through a socket included."""

    def look_at(self, descriptor: Descriptor) -> None:
        """Check a descriptor that was found on its way from one process to another."""


class Saving(Protocol):
    """What a kind may use while it dumps."""

    out: ImageSetWriter
    connections: Connections
    ghosts: GhostWriter
    warnings: list[str]
    """What is kept of a file, but not all of it, in sentences."""
    descriptors: dict[int, list[Descriptor]]
    """Of each process that was dumped so far; of all of them in `finish`."""

    def path_file(self, pid: int, link: str, flags: int) -> int:
        """Id of the file behind /proc/PID/LINK."""

    def new_id(self) -> int:
        """An id for a file that is no descriptor's."""

    def number_of(self, descriptor: Descriptor) -> int:
        """Id of the open file description behind a descriptor, dumped if it is new."""


class Opened(Protocol):
    """What a kind may use while it brings files back. `state` is each kind's own, and there for one restore."""

    images: ImageSet
    state: dict[type[FileKind], dict[int, Any]]
    made_late: Container[int]
    """Pids of processes that are made when all descriptor tables are filled."""

    @property
    def closes_connections(self) -> bool:
        """Whether TCP connections come back as sockets without one."""

    @property
    def tables(self) -> Mapping[int, Sequence[FdinfoEntry]]:
        """The descriptor tables by their ids."""

    def inside(self, name: str, number: int | None) -> AbstractContextManager[None]:
        """Be in a namespace of the tree for a moment, by its kind and number."""

    def namespace(self, name: str, number: int) -> int | None:
        """A descriptor for one in which the first process does not live; None where there is none."""

    def map_path(self, path: str) -> str:
        """Where a path of the image is to be looked for, in the mount namespace that we are in."""

    def path(self, name: str, mount: int) -> str:
        """The same for one of the mount namespace that has this mount, -1 for that of the first process."""

    def standing(self, mount: int) -> AbstractContextManager[None]:
        """Be in that namespace for a moment."""

    def entry(self, number: int) -> FileEntry:
        """The file of an id. DamagedError where there is none."""

    def regular(self, number: int) -> RegFileEntry:
        """A file that is known by its path. DamagedError where the id is another kind's."""

    def open(self, number: int) -> int:
        """Our descriptor for the description of this id, which is made if it is not there yet."""

    def open_path(self, number: int, flags: int | None = None) -> int:
        """A new description of a file that is known by its path, by default as the entry says."""

    def numbers(self, kind: FdTypes) -> list[int]:
        """The ids of all files of a kind that were made."""

    def move(self, fd: int) -> int:
        """The same description behind all numbers that tables use; `fd` is closed."""


class FileKind(ABC):
    """One kind. An instance lives for one check, one dump or one restore."""

    type: ClassVar[FdTypes]
    field: ClassVar[str]
    """Name of the FileEntry's field for this kind."""

    def __init__(self, options: FileOptions) -> None:
        self.options = options

    def message_of(self, entry: FileEntry) -> Any:
        """The part of a file's entry that is for this kind. DamagedError where it is missing."""
        found = getattr(entry, self.field)
        if found is None:
            raise damaged("files.img", 0, f"file {entry.id} lacks what its kind {FdTypes(entry.type).name} needs")
        return found

    @abstractmethod
    def claims(self, descriptor: Descriptor) -> bool:
        """Whether a descriptor is of this kind."""

    def check(self, descriptor: Descriptor, looking: Looking) -> None:
        """Note why it cannot be kept, if it cannot."""

    def check_apart(self, descriptor: Descriptor, namespace: int, looking: Looking) -> None:
        """Note why a socket cannot be kept that is of the network namespace of this number."""

    def check_all(self, looking: Looking) -> None:
        """All descriptors were looked at: note what only shows when all are known."""

    @abstractmethod
    def dump(self, descriptor: Descriptor, fd: int, number: int, saving: Saving) -> FileEntry | None:
        """The message for an open file description; `fd` is a descriptor of ours for it, `number` its id. None where
        `finish` writes it."""

    def finish(self, saving: Saving) -> None:
        """All descriptors are dumped: write what is written once for all."""

    def saved(self) -> None:
        """All is written: give back what was held for it."""

    @abstractmethod
    def restore(self, entry: FileEntry, opened: Opened) -> int:
        """Make the description again, in the root process; a descriptor for it."""

    def late(self, entry: FileEntry, opened: Opened) -> int | None:
        """In each process that has it, when other processes are there: a description in place of that which `restore`
        made; None where that one is right."""
        return None

    def resource(self, entry: FileEntry, opened: Opened) -> str:
        """What the caller calls it to put a descriptor of its own in its place; "" where it cannot."""
        return ""

    def owner(self, entry: FileEntry, opened: Opened) -> FownEntry | None:
        """Who gets its signals; None where images do not say."""
        found: FownEntry | None = self.message_of(entry).fown
        return found

    def connect(self, opened: Opened) -> None:
        """All descriptions are there: tie them together and fill them."""

    def done(self, opened: Opened) -> None:
        """All is tied: give back what was kept for it."""
