# SPDX-License-Identifier: Apache-2.0
"""Where files of an image set are by their paths: each is one of a mount namespace, and the user may have named another
one in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stasis.process.images.imageset import ImageSet
    from stasis.process.namespaces.apart import Apart

__all__ = ["Paths"]


class Paths:
    """In a process of a restore."""

    def __init__(self, images: ImageSet, outside: Callable[[str], str], inside: Callable[[str], str]) -> None:
        """`outside` gives the paths of what is there before the restore, and of the first process's files; `inside`
        those of files in other mount namespaces."""
        self._images = images
        self.outside = outside
        self._inside = inside
        self.apart: Apart | None = None

    def place(self, mount: int) -> int | None:
        """The number of the mount namespace with a mount, -1 for that of the first process; None where there is only
        one."""
        if self.apart is None or not self.apart.has_mounts:
            return None
        return self._places.get(mount, self.apart.first)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {
            entry.mnt_id: number for number in self._images.numbers("mountpoints")
            for entry in self._images.messages("mountpoints", number)
        }  # fmt: skip

    def mapped(self, path: str) -> str:
        """A path of the mount namespace that we are in."""
        is_first = self.apart is None or self.apart.here == self.apart.first
        return self.outside(path) if is_first else self._inside(path)

    def path(self, name: str, mount: int) -> str:
        """A path of the mount namespace with this mount, as it is for us."""
        place = self.place(mount)
        if self.apart is None or place is None:
            return self.outside(name)
        return self.apart.path(self.outside(name) if place == self.apart.first else self._inside(name), place)

    def is_made_here(self, mount: int) -> bool:
        """Whether the mount namespace with this mount is the one that we are in, and is not the restorer's."""
        if self.apart is None:
            return False
        place = self.place(mount)
        here = self.apart.here
        return not self.apart.is_home(here) and place in (None, here)
