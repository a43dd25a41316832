# SPDX-License-Identifier: Apache-2.0
"""Names for open files that lost the one they were opened by and have others elsewhere: a hard link beside the lost
name, made at the dump and taken away by the restore (`--link-remap`).

What was made is noted, before it is, in memory that the guardian shares: a dump that fails or dies takes it back.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from stasis.errors import StasisError
from stasis.linux.files import link_opened
from stasis.process.images.schema.files import RemapType

if TYPE_CHECKING:
    from stasis.process.files.opening import FileSet

__all__ = ["LinkRemaps", "forget_links"]

MOST_BYTES = 1 << 20


class LinkRemaps:
    """The links of a dump; a context manager that takes back those that are not kept. To be made before the guardian is
    forked."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, MOST_BYTES)
        self._used = 0

    def make(self, source: str, name: str) -> str:
        """A link to what `source` in /proc leads to, in the directory of `name` or in the next one above it that is
        there; its path."""
        directory = os.path.dirname(name)
        while True:
            path = os.path.join(directory, f".stasis-link-{os.urandom(8).hex()}")
            self._note(path)
            try:
                link_opened(source, path)
                return path
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR) or directory == os.path.dirname(directory):
                    raise StasisError(f"no link can be made for {name} in {directory}: {error.strerror}",
                                      errno=error.errno or 0) from error  # fmt: skip
            directory = os.path.dirname(directory)

    def _note(self, path: str) -> None:
        noted = os.fsencode(path) + b"\0"
        if self._used + len(noted) > MOST_BYTES:
            raise StasisError("too many files have lost their names", hint="dump without --link-remap")
        self._memory[self._used : self._used + len(noted)] = noted
        self._used += len(noted)

    def keep(self) -> None:
        """The set is there, and needs them."""
        self._memory[:1] = b"\0"

    def remove(self) -> None:
        """Take all back."""
        for path in self._memory[:].partition(b"\0\0")[0].split(b"\0"):
            if path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        self.keep()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._memory[:1] != b"\0":
            self.remove()


def forget_links(files: FileSet) -> None:
    """All processes are there, and have their files open: the links are not needed any more."""
    for remap in files.images.messages("remap-fpath"):
        if remap.remap_type == RemapType.LINKED:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.path_of(remap.remap_id))
