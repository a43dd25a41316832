# SPDX-License-Identifier: Apache-2.0
"""Writing an image set: complete or absent.

All files are written into a hidden directory and moved when everything is there. Where the set's directory does not
exist, the hidden one lies beside it and is renamed as a whole. Where it exists (CRIU's scripts make it first, and
perhaps log into it) the hidden one lies within, and the files are moved one by one with inventory.img last: without
it a directory is no image set.
"""

from __future__ import annotations

import errno
import os
import shutil
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from stasis.errors import BusyError, NotFoundError, PermissionDeniedError
from stasis.process.images.imageset import PARENT
from stasis.process.images.kinds import KINDS, parse_name
from stasis.process.images.writer import ImageWriter
from stasis.process.meter import Meter

if TYPE_CHECKING:
    from stasis.process.images.message import Message

__all__ = ["ImageSetWriter", "is_whole", "staging_for"]

_INVENTORY = "inventory.img"
MOST_HELD = 2048
"""Images or records that are held at once: a large tree has many, and they take memory."""


class ImageSetWriter:
    """An image set that is being written; a context manager that throws it away unless `commit` was called.

    `replace` allows a directory that holds an image set already; its images are removed at `commit`. `staging`: where
    it is written, a name that `staging_for` gave, for who has to know it before. `holds`: messages without payloads are
    noted only, and written by `write_held` or `commit`. `meter` counts the bytes of memory that are written, or left
    to the parent.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, replace: bool = False, staging: str = "", holds: bool = False,
        meter: Meter | None = None,
    ) -> None:
        self.meter = meter or Meter()
        self.path = os.path.abspath(os.fspath(path))
        self._into = os.path.isdir(self.path)
        self._check_target(replace)
        self.staging = staging or staging_for(self.path)
        _make(self.staging)
        self.fd = os.open(self.staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._images: dict[str, ImageWriter] = {}
        self._holds = holds
        self._asked = 0
        self._pages = 0
        self._names: list[str] = []
        self._done = False

    def _check_target(self, replace: bool) -> None:
        if self._into and not replace and os.path.lexists(os.path.join(self.path, _INVENTORY)):
            raise BusyError(f"{self.path} holds an image set already", hint="name another directory, or remove it")
        if not self._into and os.path.lexists(self.path):
            raise BusyError(f"{self.path} exists and is no directory", hint="name a directory")

    def image(self, kind: str, number: int | None = None) -> ImageWriter:
        """The image of this kind and number, the same one when asked again.

        Its file begins with its first record, and is closed by `close`, or with the set; a closed one can go on.
        """
        name = KINDS[kind].file_name(number)
        self._asked += 1
        if self._holds and not self._asked % MOST_HELD:
            self.write_held()
        if name not in self._images:
            self._images[name] = ImageWriter(KINDS[kind], lambda: self.create(name), holds=self._holds)
        return self._images[name]

    def write(self, kind: str, *messages: Message, number: int | None = None) -> None:
        """Append records without payloads to an image, and close it. Records with payloads: `image(...).append`."""
        with self.image(kind, number) as image:
            for message in messages:
                image.append(message)

    def write_held(self) -> None:
        """Write what is held."""
        for image in self._images.values():
            image.write_held()

    def new_pages_id(self) -> int:
        """The number of the next `pages-N.img`, from 1 on."""
        self._pages += 1
        return self._pages

    def create(self, name: str) -> BinaryIO:
        """A file of the set to write at its end, mode 0600 whatever the umask. The caller closes it."""
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        os.fchmod(fd, 0o600)
        file = os.fdopen(fd, "r+b")
        file.seek(0, os.SEEK_END)
        return file

    def link_parent(self, path: str | os.PathLike[str]) -> None:
        """Continue the set at `path`: pages that lie there need not be in this one."""
        target = os.path.relpath(os.path.abspath(os.fspath(path)), self.path)
        os.symlink(target, PARENT, dir_fd=self.fd)

    def commit(self, *, durable: bool = True) -> None:
        """Put the set in its place. With `durable` it survives a power cut from here on.

        ValueError when no inventory was written.
        """
        names = self._names = self._finish(durable)
        if _INVENTORY not in names:
            raise ValueError("an image set needs an inventory")
        if self._into:
            self._move_in(names)
        else:
            self._move_whole()
        self._done = True
        if durable:
            _sync(self.path)
            _sync(os.path.dirname(self.path))
        os.close(self.fd)

    def _finish(self, durable: bool) -> list[str]:
        """Write and close all files; their names, the inventory last."""
        self.write_held()
        self._close_images()
        names = sorted(os.listdir(self.fd), key=lambda name: (name == _INVENTORY, name))
        if durable:
            for name in names:
                if name != PARENT:
                    _sync(os.path.join(self.staging, name))
        return names

    def _close_images(self) -> None:
        for image in self._images.values():
            image.close()

    def _move_whole(self) -> None:
        try:
            os.rename(self.staging, self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise BusyError(f"{self.path} was made by somebody else meanwhile", hint="name another one") from error

    def _move_in(self, names: list[str]) -> None:
        for name in self._images_there():
            os.unlink(os.path.join(self.path, name))
        for name in names:
            os.rename(os.path.join(self.staging, name), os.path.join(self.path, name))
        os.rmdir(self.staging)

    def _images_there(self) -> list[str]:
        """Images of an older set in the target, its inventory first, so that no mixture ever counts as a set."""
        found = [name for name in os.listdir(self.path) if name == PARENT or parse_name(name) is not None]
        return sorted(found, key=lambda name: (name != _INVENTORY, name))

    def withdraw(self) -> None:
        """Take a set away that was put in its place, its inventory first."""
        for name in reversed(self._names):
            os.unlink(os.path.join(self.path, name))
        if not self._into:
            os.rmdir(self.path)

    def discard(self) -> None:
        """Remove what was written."""
        if not self._done:
            self._done = True
            self._close_images()
            os.close(self.fd)
            shutil.rmtree(self.staging)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.discard()


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a set was put there: its inventory comes last."""
    return os.path.lexists(os.path.join(path, _INVENTORY))


def staging_for(path: str | os.PathLike[str]) -> str:
    """The name of a directory that is not there, beside or within that of the set."""
    path = os.path.abspath(os.fspath(path))
    within = path if os.path.isdir(path) else os.path.dirname(path)
    return os.path.join(within, f".stasis-images-{os.urandom(8).hex()}")


def _make(staging: str) -> None:
    """A new hidden directory, 0700."""
    hint = "name a place where image sets can be written"
    within = os.path.dirname(staging)
    try:
        os.mkdir(staging, 0o700)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no directory {within}", hint=hint) from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{within} may not be written", hint=hint) from error


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
