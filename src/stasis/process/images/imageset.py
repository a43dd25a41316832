# SPDX-License-Identifier: Apache-2.0
"""An image set: the directory that one dump writes, and what lies in it by kind and number.

Files are opened relative to the directory and never through a symbolic link: a set from a stranger must not make
the memory of a restored task out of some other file. Only `parent`, the link to the set before this one, is followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Any, Self, TypeVar

from stasis.errors import NotFoundError, PermissionDeniedError, StasisError, UnsupportedError
from stasis.process.images.container import ImageReader, Record
from stasis.process.images.damage import damaged
from stasis.process.images.kinds import KINDS, parse_name
from stasis.process.images.message import Message
from stasis.process.meter import Meter

__all__ = ["PARENT", "ImageSet"]

PARENT = "parent"
"""The symbolic link to the set that this one continues."""

VERSIONS = (1, 2)  # inventory_entry.img_version: without and with the common magic

M = TypeVar("M", bound=Message)


class ImageSet:
    """An image set that is read. An optional image that is not there reads as empty, as CRIU has it. `meter` counts the
    bytes of memory that were read of it and of those that it continues."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self.meter = Meter()
        self._kept: dict[str, int] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a directory as an image set; its inventory is read. NotFoundError, DamagedError, UnsupportedError."""
        shown = os.fspath(path)
        return cls._opened(lambda: os.open(shown, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), shown)

    @classmethod
    def _opened(cls, opening: Any, shown: str) -> Self:
        try:
            images = cls(opening(), shown)
        except OSError as error:
            raise _refusal(shown, error) from error
        try:
            images._check_version()
        except BaseException:
            images.close()
            raise
        return images

    def _check_version(self) -> None:
        if not self.has("inventory"):
            raise NotFoundError(f"{self.path} holds no image set: there is no inventory.img",
                                hint="name the directory that a dump wrote; a dump that failed leaves none")
        version = self.inventory.img_version
        if version not in VERSIONS:
            raise UnsupportedError(f"{self.path} has image version {version}, and versions 1 and 2 are known",
                                   hint="restore it with the CRIU that wrote it")

    @property
    def inventory(self) -> Any:
        """The set's InventoryEntry."""
        return self.one("inventory")

    def keep(self) -> None:
        """Open all files now, for a process that will not have the right to."""
        names = [name for name in os.listdir(f"/proc/self/fd/{self.fd}") if name.endswith(".img")]
        self._kept = {name: self.open_file(name) for name in names}

    def close(self) -> None:
        for fd in (self._kept or {}).values():
            os.close(fd)
        self._kept = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is there.

    def files(self) -> list[tuple[str, int | None]]:
        """Kind and number of every image in the directory, sorted; other files are left out."""
        names = os.listdir(f"/proc/self/fd/{self.fd}") if self._kept is None else list(self._kept)
        found = [parse_name(name) for name in names]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: (entry[0], entry[1] or 0))

    def numbers(self, kind: str) -> list[int]:
        """The numbers of the images of a kind, ascending: pids of "core", for example."""
        return [number for name, number in self.files() if name == kind and number is not None]

    def has(self, kind: str, number: int | None = None) -> bool:
        """Whether this image is there."""
        if self._kept is not None:
            return KINDS[kind].file_name(number) in self._kept
        try:
            os.stat(KINDS[kind].file_name(number), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def file_path(self, kind: str, number: int | None = None) -> str:
        """The image's path, for messages."""
        name = KINDS[kind].file_name(number) if kind in KINDS else f"{kind}-{number}.img"
        return os.path.join(self.path, name)

    # What is in it.

    def open_file(self, name: str) -> int:
        """A descriptor to read a file of the directory. FileNotFoundError; DamagedError for all but regular files."""
        path = os.path.join(self.path, name)
        if self._kept is not None:
            return self._kept_file(name)
        try:
            # O_NONBLOCK: a fifo of this name must not hold us up
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise damaged(path, 0, "it is no regular file") from error
            raise _refusal(path, error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise damaged(path, 0, "it is no regular file")
        return fd

    def _kept_file(self, name: str) -> int:
        """Another descriptor for the same description: readers say where they read."""
        assert self._kept is not None
        if name not in self._kept:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return os.dup(self._kept[name])

    def open_pages(self, number: int) -> int:
        """A descriptor to read `pages-NUMBER.img`. DamagedError where it is missing."""
        name = f"pages-{number}.img"
        try:
            return self.open_file(name)
        except FileNotFoundError as error:
            raise damaged(os.path.join(self.path, name), 0, "it is missing") from error

    def image(self, kind: str, number: int | None = None) -> ImageReader:
        """The image, to be read record by record with payloads. FileNotFoundError; see `records`."""
        name = KINDS[kind].file_name(number)
        file = os.fdopen(self.open_file(name), "rb")
        try:
            return ImageReader(file, os.path.join(self.path, name), KINDS[kind])
        except BaseException:
            file.close()
            raise

    def records(self, kind: str, number: int | None = None) -> Iterator[Record]:
        """The records of an image, none where it is missing. Payloads: use `image`."""
        try:
            image = self.image(kind, number)
        except FileNotFoundError:
            return
        with image:
            yield from image

    def messages(self, kind: str, number: int | None = None) -> list[Any]:
        """All messages of an image, in order, none where it is missing. Their class is the kind's, see kinds."""
        return [record.message for record in self.records(kind, number)]

    def one(self, kind: str, number: int | None = None) -> Any:
        """The message of an image that holds exactly one. DamagedError where it is missing or holds another count."""
        found = None
        for record in self.records(kind, number):
            if found is not None:
                raise damaged(self.file_path(kind, number), record.offset, "a second record follows the only one")
            found = record.message
        if found is None:
            reason = "it has no record" if self.has(kind, number) else "it is missing"
            raise damaged(self.file_path(kind, number), 0, reason)
        return found

    # The set before this one.

    def has_parent(self) -> bool:
        """Whether this set continues another one."""
        try:
            os.stat(PARENT, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def parent(self) -> ImageSet | None:
        """The set that this one continues, opened; None where it stands alone."""
        if not self.has_parent():
            return None
        shown = os.path.join(self.path, PARENT)
        return self._opened(lambda: os.open(PARENT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd), shown)

    def chain(self) -> list[ImageSet]:
        """This set and all before it, newest first; the caller closes all but this one.

        DamagedError where the links go round in a circle.
        """
        seen = {self._identity()}
        found = [self]
        try:
            while (before := found[-1].parent()) is not None:
                found.append(before)
                if before._identity() in seen:
                    raise damaged(before.path, 0, "the chain of parents goes round in a circle")
                seen.add(before._identity())
        except BaseException:
            for images in found[1:]:
                images.close()
            raise
        return found

    def _identity(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino


def _refusal(path: str, error: OSError) -> StasisError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundError(f"{path} is no image directory", hint="name the directory that a dump wrote")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"{path} may not be read", hint="image sets belong to whoever dumped")
    return StasisError(f"{path} cannot be read: {error.strerror or error}", errno=error.errno or 0)
