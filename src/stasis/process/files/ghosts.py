# SPDX-License-Identifier: Apache-2.0
"""Ghosts: files that are open or mapped and have no name any more. Their contents go into the image set, holes left
out; at the restore they are made anew under the name they had, which is taken away at once."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from stasis.errors import StateError
from stasis.process.images.damage import damaged
from stasis.process.images.schema.common import Timeval
from stasis.process.images.schema.files import (
    FdTypes,
    FileEntry,
    GhostChunkEntry,
    GhostFileEntry,
    RegFileEntry,
    RemapFilePathEntry,
    RemapType,
)
from stasis.process.namespaces.identities import Identities
from stasis.process.traces import with_name

if TYPE_CHECKING:
    from stasis.process.files.linkremap import LinkRemaps
    from stasis.process.images.container import Record
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.payloads import Part
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["DELETED", "GhostWriter", "Ghosts", "allocated"]

DELETED = " (deleted)"
PORTION = 1 << 20
MOST_NAMES = 1000
LARGEST_FILE = (1 << 63) - 1


def allocated(status: os.stat_result) -> int:
    """Bytes that a file occupies on its disk."""
    return status.st_blocks * 512


class GhostWriter:
    """Writes each deleted file once, however many open it."""

    def __init__(self, out: ImageSetWriter, links: LinkRemaps | None = None) -> None:
        """`links`: for files that have lost their name, and have others."""
        self._out = out
        self._links = links
        self._linked: dict[tuple[int, int], int] = {}
        self._written: dict[tuple[int, int], int] = {}

    def keep(self, number: int, link: str, status: os.stat_result) -> None:
        """Have file `number` be the deleted file that `link` in /proc leads to."""
        key = status.st_dev, status.st_ino
        if key not in self._written:
            self._written[key] = len(self._written) + 1
            self._write(self._written[key], link, status)
        remap = RemapFilePathEntry(orig_id=number, remap_id=self._written[key], remap_type=RemapType.GHOST)
        self._out.write("remap-fpath", remap)

    def link(self, number: int, source: str, name: str, status: os.stat_result, new_id: Callable[[], int]) -> None:
        """Have file `number`, which had `name`, be found by a new link to it."""
        from stasis.process.files.regular import path_entry

        assert self._links is not None, "they were refused"
        key = status.st_dev, status.st_ino
        if key not in self._linked:
            self._linked[key] = new_id()
            entry = path_entry(self._linked[key], self._links.make(source, name), status, 0)
            self._out.write("files", FileEntry(type=FdTypes.REG, id=entry.id, reg=entry))
        remap = RemapFilePathEntry(orig_id=number, remap_id=self._linked[key], remap_type=RemapType.LINKED)
        self._out.write("remap-fpath", remap)

    def _write(self, ghost: int, link: str, status: os.stat_result) -> None:
        is_regular, inside = stat.S_ISREG(status.st_mode), Identities.inside()
        entry = GhostFileEntry(
            uid=inside.uid(status.st_uid), gid=inside.gid(status.st_gid), mode=status.st_mode, ino=status.st_ino,
            dev=os.major(status.st_dev) << 20 | os.minor(status.st_dev), atim=_timeval(status.st_atime_ns),
            mtim=_timeval(status.st_mtime_ns), chunks=is_regular or None, size=status.st_size if is_regular else None,
        )  # fmt: skip
        with self._out.image("ghost-file", ghost) as image:
            image.append_head(entry)
            if not is_regular:
                return
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for offset, length in _data(fd, status.st_size):
                    image.append_head(GhostChunkEntry(len=length, off=offset))
                    image.copy(fd, length, offset=offset)
            finally:
                os.close(fd)


def _timeval(nanoseconds: int) -> Timeval:
    return Timeval(tv_sec=nanoseconds // 10**9, tv_usec=nanoseconds % 10**9 // 1000)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what is no hole."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: nothing but a hole up to the end
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < size:
            yield start, offset - start


class Ghosts:
    """The deleted files of an image set, each made when it is asked for first."""

    def __init__(self, images: ImageSet, move: Callable[[int], int], name_of: Callable[[int], str]) -> None:
        """`move` takes a descriptor out of the way of those that the processes are to have; `name_of` gives the path of
        a file by its id."""
        self._images = images
        self._move = move
        self._name_of = name_of
        self._remaps: dict[int, RemapFilePathEntry] = {}
        self._made: dict[int, str] = {}
        for entry in images.messages("remap-fpath"):
            self._remaps[entry.orig_id] = entry

    def path(self, entry: RegFileEntry, path: str) -> str | None:
        """Where in /proc a file that had the name `path` is to be opened; None for one that still has its name."""
        remap = self._remaps.get(entry.id)
        if remap is not None and remap.remap_type == RemapType.LINKED:
            return self._linked(remap.remap_id, path)
        if remap is None or remap.remap_type != RemapType.GHOST:
            return None
        if remap.remap_id not in self._made:
            self._made[remap.remap_id] = f"/proc/self/fd/{self._move(self._make(remap.remap_id, path))}"
        return self._made[remap.remap_id]

    def _linked(self, number: int, path: str) -> str:
        """Where the file is to be opened that has only a link: under the name it had, for a moment, where that is
        free."""
        link = self._name_of(number)
        if os.path.lexists(path) or not os.path.exists(link):
            return link  # the name is another file's, or whoever opens it says that it is gone
        with with_name(path, os.stat(link)):
            try:
                os.link(link, path)
            except OSError:
                return link  # its directory is gone
            try:
                fd = self._move(os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW))
            finally:
                os.unlink(path)
        return f"/proc/self/fd/{fd}"

    def _make(self, ghost: int, path: str) -> int:
        """A descriptor for the file, which has no name. It stays for the processes that are made later."""
        name = self._images.file_path("ghost-file", ghost)
        try:
            image = self._images.image("ghost-file", ghost)
        except FileNotFoundError as error:
            raise damaged(name, 0, "it is missing") from error
        with image:
            for record in image:
                assert isinstance(record.message, GhostFileEntry)
                fd = _create(path, record.message)
                _fill(fd, image.fileno(), record, name)
                return fd
        raise damaged(name, 0, "it has no record")


def _create(path: str, entry: GhostFileEntry) -> int:
    """A new file or directory that had this path for a moment, or one like it where that is taken."""
    made = os.path.join(os.path.dirname(path), f".stasis-ghost-{os.urandom(8).hex()}")
    try:
        with with_name(made):
            fd = _make_at(made, entry.mode)
            try:
                _rename_and_remove(made, path, os.fstat(fd))
            except BaseException:
                os.close(fd)
                with contextlib.suppress(OSError):
                    _remove(made, entry.mode)
                raise
        return fd
    except OSError as error:
        raise StateError(f"{path}, a deleted file that a process had open, cannot be made: {error.strerror}",
                         hint="bring its directory back, or name another one with --map-path",
                         errno=error.errno or 0) from error  # fmt: skip


def _make_at(path: str, mode: int) -> int:
    if stat.S_ISDIR(mode):
        os.mkdir(path, 0o700)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if stat.S_ISFIFO(mode):
        os.mkfifo(path, 0o600)
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _rename_and_remove(made: str, path: str, status: os.stat_result) -> None:
    """Have a file lose the wanted name, or one like it where that is taken; or the one it has, where the file system
    cannot rename without replacing."""
    from stasis.linux.files import rename_to_free

    for number in range(MOST_NAMES):
        name = f"{path}.{number}" if number else path
        with with_name(name, status):
            try:
                rename_to_free(made, name)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                name = made
            _remove(name, status.st_mode)
            return
    raise StateError(f"there is no name free beside {path} to make a deleted file anew", hint="clean the directory up")


def _remove(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        os.rmdir(path)
    else:
        os.unlink(path)


def _fill(fd: int, source: int, record: Record, name: str) -> None:
    entry = record.message
    assert isinstance(entry, GhostFileEntry)
    for part in record.parts:
        offset = part.message.off if isinstance(part.message, GhostChunkEntry) else 0
        if offset + part.size > LARGEST_FILE or (entry.size is not None and offset + part.size > entry.size):
            raise damaged(name, part.offset, "a piece of the file lies behind its end")
        _copy(source, part, fd, offset)
    if entry.size is not None and stat.S_ISREG(entry.mode):
        os.ftruncate(fd, entry.size)
    os.fchown(fd, entry.uid, entry.gid)
    os.fchmod(fd, stat.S_IMODE(entry.mode))
    if entry.atim is not None and entry.mtim is not None:
        os.utime(fd, ns=(_nanoseconds(entry.atim), _nanoseconds(entry.mtim)))


def _nanoseconds(time: Timeval) -> int:
    return min(time.tv_sec, 1 << 33) * 10**9 + min(time.tv_usec, 10**6) * 1000


def _copy(source: int, part: Part, fd: int, offset: int) -> None:
    done = 0
    while done < part.size:
        data = os.pread(source, min(PORTION, part.size - done), part.offset + done)
        os.pwrite(fd, data, offset + done)
        done += len(data)
