# SPDX-License-Identifier: Apache-2.0
"""What a repository needs of the place it is kept in: named objects that appear whole and never change.

A name is a relative path of ASCII letters, digits, `-`, `_`, `.` and `/`. `local` keeps objects in a folder, `cloud`
in an object store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from stasis.errors import DamagedError, UsageError

__all__ = ["LARGEST_OBJECT", "Buffer", "ObjectInfo", "Store", "is_hexadecimal", "open_store", "refuse_size"]

Buffer = bytes | bytearray | memoryview

CLOUD_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory")


LARGEST_OBJECT = 64 << 20  # no content is longer: a manifest of 256 TiB in chunks of 1 MiB takes 4 MiB


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it: `size` in bytes, `modified` in seconds by the clock of the store."""

    name: str
    size: int
    modified: float


class Store(Protocol):
    """A place for objects. All calls may be made from any thread.

    url: as messages name it. parallelism: how many threads at once are worth having.
    listing_lag: seconds until an object that was put is sure to be in every listing, 0 where that is at once.
    cheap_lookup: whether `exists` costs next to nothing, as a `stat` does.
    """

    url: str
    parallelism: int
    listing_lag: float
    cheap_lookup: bool

    def put(self, name: str, *parts: Buffer) -> bool:
        """Write an object, durably and visible as a whole; False, and nothing happens, when the name is taken."""

    def stage(self, name: str, *parts: Buffer) -> bool:
        """As `put`, but the object may become visible and durable as late as the next `sync`."""

    def get(self, name: str) -> bytes:
        """The content. Raises NotFoundError."""

    def get_into(self, name: str, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers one after the other; the size of the object, also where that is larger than they are
        together. Raises NotFoundError."""

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""

    def stat(self, name: str) -> ObjectInfo | None:
        """Size and time of an object, None when there is none."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects in the folder `prefix` (without a slash at its end) and below, in no order; "" lists all."""

    def delete(self, name: str) -> None:
        """Remove an object; that there is none is fine."""

    def sync(self) -> None:
        """Everything put or staged so far, by any thread, is visible and survives a power cut."""

    def clean(self) -> int:
        """Remove what killed writers left behind that has no name yet; returns how many. Only under the exclusive
        lock."""

    def close(self) -> None:
        """Give back what the store holds."""


def open_store(url: str, *, create: bool = False) -> Store:
    """The store that a URL names: a path, `file://`, `s3://`, `gs://`, `az://`. Raises UsageError.

    create: a folder that is missing may be made; else it has vanished, as a disk that was unmounted.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        from stasis.backup.repo.local import LocalStore

        return LocalStore(rest if separator else url, create=create)
    if scheme in CLOUD_SCHEMES:
        from stasis.backup.repo.cloud import CloudStore

        return CloudStore(url)
    raise UsageError(f"{url!r} names no kind of repository that is known",
                     hint="write a path, or a URL that starts with s3://, gs:// or az://")


def refuse_size(name: str, url: str, size: int) -> None:
    """Raises DamagedError for an object that would only use up memory."""
    if size > LARGEST_OBJECT + 4096:
        raise DamagedError(f"{name} in the repository {url} is damaged: it has {size} bytes, more than any object",
                           hint="stasis backup check lists everything that is damaged and the backups that need it")


def is_hexadecimal(text: str, digits: int) -> bool:
    """Whether this is a name that we gave; what file managers and copying programs leave behind is not."""
    return len(text) == digits and not text.strip("0123456789abcdef")
