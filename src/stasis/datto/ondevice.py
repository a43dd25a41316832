# SPDX-License-Identifier: Apache-2.0
"""The worker's side of a COW file on the device that it protects: making it with the helper process, trying its map,
watching its blocks, giving it back.

No call here waits for the file system in the worker's loop, nor in a thread of the worker: a process that waits for the
device that it serves itself could not even be killed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from errno import EINVAL, EIO
from pathlib import Path
from typing import Any

from stasis.block.plugins import Host
from stasis.datto.claim import Claim
from stasis.datto.extents import Territory, probes
from stasis.datto.helper import Session
from stasis.datto.layout import BLOCK_SIZE, Geometry, Header, default_size
from stasis.datto.mapped import DeviceBlocks, MappedCowFile
from stasis.datto.pinned import Pinned
from stasis.datto.placing import temporary_name, token
from stasis.errors import StasisError, StateError
from stasis.linux import files

__all__ = ["MappedSource", "Places", "new_header"]

KEY_SIZE = 16


class Places:
    """The COW files of one device that lie on it. `module` is the helper's."""

    def __init__(self, host: Host, module: str, claimed: Callable[[Claim | None], None]) -> None:
        """`claimed` has the export watch over a claim, or over none any more."""
        self._host, self._module, self._claimed = host, module, claimed
        self.directory: Path | None = None
        self.node = ""
        """The device's node as it is called now; it may have had another name when a file was made."""
        self._session: Session | None = None
        self._is_ending = False

    # -- making one -------------------------------------------------------------------------------------

    def make(self, path: str, header: Header, geometry: Geometry, cache: int, node: str, in_use: int
             ) -> MappedCowFile | None:
        """A COW file at `path`, if that lies on the file system of `node`; else None. Beside the loop.

        Its blocks are claimed from before it is filled: `begin` ends the claim. Raises StasisError or OSError; nothing
        is left behind then.
        """
        with self._open_session() as session:
            answer = session.ask(op="create", path=path, size=header.fsize, node=node, in_use=in_use)
            if "elsewhere" in answer:
                return None
            pinned = Pinned(os.path.realpath(path), answer["relative"], answer["inode"], node, header.uuid.hex(),
                            header.seqid, header.fsize, tuple((a, b, c) for a, b, c in answer["stretches"]))
            return self._claim(session, pinned, header, geometry, cache)

    def _claim(self, session: Session, pinned: Pinned, header: Header, geometry: Geometry, cache: int
               ) -> MappedCowFile:
        directory = self._directory()
        claim = Claim(Territory(pinned.blocks.ranges(), BLOCK_SIZE))
        with contextlib.ExitStack() as undo:
            undo.callback(self._clear_away, session, pinned)
            blocks = self._open_blocks(pinned)
            undo.callback(os.close, blocks.fd)
            undo.callback(self._claimed, None)
            self._claimed(claim)
            blocks.claim = claim
            self._try(session, blocks, pinned, claim)
            cow = MappedCowFile(pinned, blocks, geometry, header, cache, self, fresh=True)
            cow.write_header()
            cow.sync()
            undo.callback(pinned.forget, directory)
            pinned.save(directory)
            session.ask(settle=True)
            session.ask(keep=True)
            claim.require(pinned.path)
            undo.pop_all()
        return cow

    def _clear_away(self, session: Session, pinned: Pinned) -> None:
        """After a failure: what the helper did not take away itself, because it was killed."""
        session.end()
        for path in (temporary_name(pinned.path, session.process.pid), pinned.path):
            with contextlib.suppress(OSError):
                self._do("forget", replace(pinned, path=path), series=None)

    def _try(self, session: Session, blocks: DeviceBlocks, pinned: Pinned, claim: Claim) -> None:
        """What the file system wrote must be found on the device, then what we write there through the file system.
        Only after that anything is written for good, and while the claim is not broken."""
        key, answer = os.urandom(KEY_SIZE), os.urandom(KEY_SIZE)
        places = probes(pinned.blocks, pinned.size)
        session.ask(token=key.hex())
        claim.is_filling = False
        _compare(blocks, places, key, pinned.path)
        claim.require(pinned.path)
        for offset, length in places:
            blocks.write(memoryview(token(answer, offset, length)), offset)
        session.ask(token=answer.hex())
        _compare(blocks, places, answer, pinned.path)
        claim.require(pinned.path)
        for offset, length in places:
            blocks.write(memoryview(bytes(length)), offset)

    def _open_blocks(self, pinned: Pinned) -> DeviceBlocks:
        # A descriptor of its own: what the kernel tells it of failed writes is not kept from the origin's.
        return DeviceBlocks(files.reopen(self._host.origin.buffered_fd, os.O_RDWR), pinned.blocks,
                            self._host.export.before_beneath)

    def _open_session(self) -> Session:
        self._session = session = Session(self._module)
        if self._is_ending:
            session.kill()
        return session

    def cancel(self) -> None:
        """The worker ends: whatever waits for a file system is not waited for."""
        self._is_ending = True
        if self._session is not None:
            self._session.kill()

    # -- what MappedCowFile asks for ---------------------------------------------------------------------

    def shrink(self, pinned: Pinned, to: Pinned) -> None:
        """Cut the file off. What is cut off counts as changed, and is the file system's again."""
        self._mark(Territory(pinned.blocks.ranges(), BLOCK_SIZE), to)
        directory = self._directory()

        def job() -> None:
            to.save(directory)  # before the blocks can belong to somebody else
            self._do("truncate", to, blocks=to.stretches)

        self._host.background.run(job, lambda error: self._tell(error, f"{pinned.path} stays large for now"))

    def release(self, pinned: Pinned, head: bytes) -> None:
        """Give a finished file back, beside the loop. OSError if that cannot be done now: `sweep` tries again."""
        self._do("release", pinned, head=head.hex(), size=pinned.size)
        pinned.forget(self._directory())

    def remove(self, pinned: Pinned) -> None:
        """Have the file removed, or remember to."""
        self.mark(pinned)
        with contextlib.suppress(OSError):
            replace(pinned, doomed=True).save(self._directory())
        self._host.background.run(lambda: self._remove(pinned),
                                  lambda error: self._tell(error, f"{pinned.path} is not removed yet"))

    def _remove(self, pinned: Pinned) -> None:
        self._do("forget", pinned, series=(pinned.uuid, pinned.seqid))
        pinned.forget(self._directory())

    def mark(self, pinned: Pinned) -> None:
        """Enter the file's blocks in the change map: they are anybody's from now on. In the loop."""
        self._mark(Territory(pinned.blocks.ranges(), BLOCK_SIZE), None)

    def _mark(self, territory: Territory, but: Pinned | None) -> None:
        kept = Territory(but.blocks.ranges() if but else (), BLOCK_SIZE)
        tracker, size = self._host.tracker, self._host.origin.size
        if tracker is not None:
            tracker.mark_both([(start, end - start) for low, high in territory.ranges
                               for start, end in kept.outside(low, min(high, size))])

    def _do(self, operation: str, pinned: Pinned, **fields: Any) -> None:
        try:
            with self._open_session() as session:
                session.ask(op=operation, path=pinned.path, inode=pinned.inode, node=self.node or pinned.node, **fields)
        except StasisError as error:
            raise OSError(error.errno or EIO, error.message) from error

    def _tell(self, error: OSError | None, what: str) -> None:
        if error is not None:
            print(f"WARNING {what}: {error.strerror or error}", file=sys.stderr, flush=True)

    def _directory(self) -> Path:
        assert self.directory is not None
        return self.directory

    # -- later ----------------------------------------------------------------------------------------------

    def sweep(self, directory: Path, node: str, but: Collection[Path]) -> None:
        """Give back what earlier tracers left pinned, but for some records. Beside the loop; what fails is told."""
        self.directory, self.node = directory, node
        for pinned in Pinned.all(directory):
            if pinned.place(directory) in but:
                continue
            here = replace(pinned, node=node)
            try:
                if pinned.doomed:
                    self._remove(here)
                else:
                    self.release(here, self._head(here))
            except OSError as error:
                self._tell(error, f"{pinned.path} stays protected from changes")

    def _head(self, pinned: Pinned) -> bytes:
        blocks = self._open_blocks(pinned)
        head = bytearray(64)
        try:
            blocks.read(memoryview(head), 0)
        finally:
            os.close(blocks.fd)
        return bytes(head)

    def verify(self, pinned: Pinned, node: str) -> None:
        """Look whether the file still lies where it did. Beside the loop. OSError."""
        self._do("verify", replace(pinned, node=node), blocks=pinned.stretches)


def _compare(blocks: DeviceBlocks, places: Sequence[tuple[int, int]], key: bytes, path: str) -> None:
    for offset, length in places:
        found = bytearray(length)
        blocks.read(memoryview(found), offset)
        if found != token(key, offset, length):
            raise StateError(f"{path} does not lie where its file system says", errno=EINVAL,
                             hint="name a file on another disk")


class MappedSource:
    """A COW file on the device that is taken up again, by its blocks: no file system is asked, which may not even be
    mounted yet. See `opening.Source`."""

    def __init__(self, places: Places, pinned: Pinned) -> None:
        self._places, self._pinned = places, pinned
        self.path = pinned.path

    def open(self) -> int:
        """A memory file that shows header and index. OSError."""
        pinned = self._pinned
        blocks = self._places._open_blocks(pinned)
        try:
            if blocks.blocks.length < pinned.size or pinned.blocks.ranges()[-1][1] > self._places._host.origin.size:
                raise StateError(f"{self.path} does not lie on its device any more", errno=EINVAL,
                                 hint="begin a new series with setup-snapshot")
            return blocks.copy(min(pinned.size, Geometry(self._places._host.origin.size).data_offset), pinned.size)
        finally:
            os.close(blocks.fd)

    def build(self, fd: int, geometry: Geometry, header: Header, cache: int) -> MappedCowFile:
        """The file, to be written from now on. StateError (EINVAL) if it is not the one that was pinned."""
        os.close(fd)
        if (header.uuid.hex(), header.seqid) != (self._pinned.uuid, self._pinned.seqid):
            raise StateError(f"another COW file lies where {self.path} was", errno=EINVAL,
                             hint="begin a new series with setup-snapshot")
        blocks = self._places._open_blocks(self._pinned)
        cow = MappedCowFile(self._pinned, blocks, geometry, header, cache, self._places, fresh=False)
        _check_own_blocks(cow)
        return cow


def _check_own_blocks(cow: MappedCowFile) -> None:
    """None of the file's own blocks can have changed: who wrote there would have ended the tracer."""
    for low, high in cow.territory.ranges:
        first, end = -(-low // BLOCK_SIZE), high // BLOCK_SIZE
        if first < end and cow.index.runs_without(first, end) != [(first, end)]:
            cow.close()
            raise StateError(f"{cow.path} lists blocks of its own as changed", errno=EINVAL,
                             hint="begin a new series with setup-snapshot")


def new_header(uuid: bytes, seqid: int, size: int, geometry: Geometry) -> Header:
    """The header of a new file of `size` bytes, 0 for a tenth of the device."""
    return Header(0, geometry.first_slot, max(size or default_size(geometry.size), geometry.data_offset), seqid, uuid)
