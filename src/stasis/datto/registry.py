# SPDX-License-Identifier: Apache-2.0
"""All tracers of a host under their minors, and dattobd's calls on them with its errnos, checked in its order.

What is done to a device is done by the backend, which the daemon is; so the rules can be tested without one. The table
of errnos is in docs/guide/datto.md.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from errno import EBUSY, EFBIG, EINVAL, ENOENT
from typing import Any, Protocol

from stasis.datto.record import FILES_REMEMBERED, Target, TracerRecord
from stasis.datto.states import Move, State, move
from stasis.errors import BusyError, NotFoundError, StasisError, StateError, StorageError, UsageError

__all__ = ["LIVE", "MIB", "PATH_MAX", "Backend", "Registry", "Target", "TracerRecord"]

MIB = 1 << 20
PATH_MAX = 4096
LIVE = "live:"
"""Before its minor: what stands for the device of a tracer that only looks at the change map of a live device."""


class Backend(Protocol):
    """What the registry needs done."""

    def limit(self) -> int:
        """How many minors there are."""
        ...

    def find(self, path: str) -> Target:
        """NotFoundError (ENOENT), or UsageError (ENOTBLK) for what is no device."""
        ...

    def ask(self, device: str, request: str, **fields: Any) -> dict[str, Any]:
        """A request to the tracer's part of the device's worker; its answer describes the tracer."""
        ...

    def prepare(self, device: str, minor: int, cow: str, size: int, cache: int) -> None:
        """Make the files of a first snapshot of the device. Raises what cannot be, with its errno."""
        ...

    def changed(self) -> None:
        """Remember the tracers as they are now."""
        ...


class Registry:
    """The tracers. Calls raise StasisError with dattobd's errno; who calls holds the daemon's lock."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.tracers: dict[int, TracerRecord] = {}

    # -- checks ---------------------------------------------------------------------------------------

    def _check_minor(self, minor: int) -> None:
        limit = self._backend.limit()
        if not 0 <= minor < limit:
            raise UsageError(f"there is no minor {minor}", errno=EINVAL, hint=f"minors go from 0 to {limit - 1}")

    def _check_free(self, minor: int) -> None:
        self._check_minor(minor)
        if minor in self.tracers:
            raise BusyError(f"minor {minor} is in use for {self.tracers[minor].bdev}", errno=EBUSY,
                            hint="stasis datto list shows them")

    def find(self, minor: int) -> TracerRecord:
        """The tracer, with what its worker says of it now. UsageError (EINVAL) or NotFoundError (ENOENT)."""
        self._check_minor(minor)
        if minor not in self.tracers:
            raise NotFoundError(f"there is no tracer with minor {minor}", errno=ENOENT,
                                hint="stasis datto list shows them")
        record = self.tracers[minor]
        self._refresh(record)
        return record

    def _refresh(self, record: TracerRecord) -> int:
        """Bring the record up to date; tells how many have the image open."""
        if not record.state.is_active or record.device is None:
            return 0
        try:
            described = self._backend.ask(record.device, "info")
        except StasisError:
            return 0  # its worker is being restarted: the record says what was known
        if described.get("minor") != record.minor:
            return 0
        record.take(described)
        return int(described.get("open", 0))

    def _find_closed(self, minor: int) -> TracerRecord:
        record = self.find(minor)
        if self._refresh(record):
            raise BusyError(f"the image datto{minor} is in use", errno=EBUSY, hint="end what reads it")
        return record

    def _refuse_failed(self, record: TracerRecord) -> None:
        if record.error:
            raise StateError(f"tracer {record.minor} has failed with error {record.error}", errno=EINVAL,
                             hint=record.reason or "destroy it and begin a new series")

    def _check_path(self, path: str) -> None:
        if not path or len(path.encode()) >= PATH_MAX:
            raise UsageError("a path is empty or too long", errno=EINVAL, hint=f"at most {PATH_MAX - 1} bytes")

    def _check_size(self, mib: int) -> int:
        if mib < 0 or mib * MIB >= 1 << 63:
            raise StorageError(f"no file can have {mib} MiB", errno=EFBIG)
        return mib * MIB

    def _active(self, record: TracerRecord, wanted: State, what: str) -> str:
        self._refuse_failed(record)
        if record.state is not wanted or record.device is None:
            raise StateError(f"{what} is not possible: tracer {record.minor} is {record.state}", errno=EINVAL,
                             hint=f"it must be {wanted}")
        return record.device

    # -- the calls --------------------------------------------------------------------------------------

    def setup_snapshot(self, minor: int, bdev: str, cow: str, fallocated: int = 0, cache: int = 0) -> TracerRecord:
        """Begin a series. `fallocated` in MiB, `cache` in bytes; 0 for the defaults."""
        return self.setup_group([(minor, bdev, cow)], fallocated, cache)[0]

    def setup_group(self, members: list[tuple[int, str, str]], fallocated: int = 0, cache: int = 0,
                    begin: Callable[[list[str]], dict[str, dict[str, Any]]] | None = None) -> list[TracerRecord]:
        """Begin several series, (minor, device, COW file) each: all or none. `begin` begins them at one instant."""
        size = self._check_size(fallocated)
        records: list[TracerRecord] = []
        prepared: list[str] = []
        try:
            for minor, bdev, cow in members:
                records.append(self._new_record(minor, bdev, cow, fallocated, cache, records))
                device = str(records[-1].device)
                self._backend.prepare(device, minor, cow, size, cache)
                prepared.append(device)
            begun = begin(prepared) if begin else {prepared[0]: self._backend.ask(prepared[0], "begin")}
        except BaseException:
            for device in prepared:
                self._undo(device)
            raise
        for record in records:
            record.take(begun[str(record.device)])
            record.taken = time.time()
            self.tracers[record.minor] = record
        self._backend.changed()
        return records

    def _undo(self, device: str) -> None:
        """The device had no tracer before: whatever was prepared or begun there goes."""
        for request in ("abort", "drop"):
            with contextlib.suppress(StasisError):  # the first failure is the one to tell
                self._backend.ask(device, request)

    def _new_record(self, minor: int, bdev: str, cow: str, fallocated: int, cache: int,
                    others: list[TracerRecord]) -> TracerRecord:
        self._check_path(bdev)
        self._check_path(cow)
        self._check_free(minor)
        if any(other.minor == minor for other in others):
            raise BusyError(f"minor {minor} is named twice", errno=EBUSY)
        target = self._backend.find(bdev)
        if target.device is None:
            raise StateError(f"{bdev} is not served", errno=EINVAL,
                             hint=f"stasis device attach {bdev}; or stasis datto setup --live as it is in use")
        self._refuse_traced(bdev, target, others)
        return TracerRecord(minor, target.path, cow, State.ACTIVE_SNAPSHOT, target.key, target.device, cache=cache,
                            fallocated=fallocated)

    def _refuse_traced(self, bdev: str, target: Target, others: list[TracerRecord]) -> None:
        for other in [*self.tracers.values(), *others]:
            if other.key == target.key and not other.state.is_unverified:
                raise StateError(f"{bdev} is traced already, as minor {other.minor}", errno=EINVAL)

    def new_live(self, minor: int, bdev: str, cow: str) -> TracerRecord:
        """A tracer of a live device, which `enter` makes one of the tracers. The checks are those of setup_snapshot.

        The path is kept as it was given: it may be a link that survives a reboot.
        """
        self._check_path(bdev)
        self._check_path(cow)
        self._check_free(minor)
        target = self._backend.find(bdev)
        if target.device is not None:
            raise StateError(f"{bdev} is served", errno=EINVAL, hint="setup-snapshot keeps old contents there")
        self._refuse_traced(bdev, target, [])
        return TracerRecord(minor, bdev, cow, State.ACTIVE_INCREMENTAL, target.key, f"{LIVE}{minor}")

    def enter(self, record: TracerRecord) -> None:
        """The tracer has begun."""
        self.tracers[record.minor] = record
        self._backend.changed()

    def reload_snapshot(self, minor: int, bdev: str, cow: str, cache: int = 0) -> TracerRecord:
        """Take a snapshot's file up when the device is served next."""
        return self._reload(minor, bdev, cow, cache, State.UNVERIFIED_SNAPSHOT)

    def reload_incremental(self, minor: int, bdev: str, cow: str, cache: int = 0) -> TracerRecord:
        """Take an incremental file up when the device is served next."""
        return self._reload(minor, bdev, cow, cache, State.UNVERIFIED_INCREMENTAL)

    def _reload(self, minor: int, bdev: str, cow: str, cache: int, state: State) -> TracerRecord:
        self._check_path(bdev)
        self._check_path(cow)
        self._check_free(minor)
        target = self._backend.find(bdev)
        if target.device is not None:
            raise StateError(f"{bdev} is served already: what was written since {cow} was in use is not known",
                             errno=EINVAL, hint="reload before stasis device attach")
        record = self.tracers[minor] = TracerRecord(minor, bdev, cow, state, target.key, cache=cache)
        self._backend.changed()
        return record

    def destroy(self, minor: int) -> None:
        """End a tracer. The COW file goes, except that of one that is dormant or unverified."""
        record = self._find_closed(minor)
        if record.device is not None and self._is_held(record, record.device):
            self._backend.ask(record.device, "retire" if record.resting else "drop")
        del self.tracers[minor]
        self._backend.changed()

    def _is_held(self, record: TracerRecord, device: str) -> bool:
        """Whether a worker has it: also one that failed before a daemon that was started again had seen it active."""
        if record.state.is_active or record.resting:
            return True
        try:
            return bool(record.error) and self._backend.ask(device, "info").get("minor") == record.minor
        except StasisError:
            return False  # the device is not served any more

    def transition_incremental(self, minor: int) -> TracerRecord:
        """Keep no more contents, only what changes."""
        record = self._find_closed(minor)
        device = self._active(record, State.ACTIVE_SNAPSHOT, "transition-to-incremental")
        described = self._backend.ask(device, "incremental")
        record.state, record.auto_expand = move(record.state, Move.TO_INCREMENTAL), None
        record.take(described)
        self._backend.changed()
        return record

    def transition_snapshot(self, minor: int, cow: str, fallocated: int = 0) -> TracerRecord:
        """The next snapshot of the series, with a new COW file. `fallocated` in MiB, 0 for the figure before."""
        record, device, size = self.check_snapshot(minor, cow, fallocated)
        figure, finished = fallocated or record.fallocated, (str(record.seqid), record.cow)
        described = self._backend.ask(device, "snapshot", cow=cow, size=size or figure * MIB)
        record.state, record.fallocated = move(record.state, Move.TO_SNAPSHOT), figure
        record.take(described)
        record.taken = time.time()
        record.finished = dict([*record.finished.items(), finished][-FILES_REMEMBERED:])
        self._backend.changed()
        return record

    def check_snapshot(self, minor: int, cow: str, fallocated: int) -> tuple[TracerRecord, str, int]:
        """Whether there can be a next snapshot now: the tracer, its device, the size in bytes."""
        self._check_path(cow)
        size = self._check_size(fallocated)
        record = self._find_closed(minor)
        return record, self._active(record, State.ACTIVE_INCREMENTAL, "transition-to-snapshot"), size

    def distrust(self, minor: int) -> None:
        """What the series says of changes was found to be wrong: nothing goes on from its snapshots so far."""
        record = self.find(minor)
        record.trusted_from = record.seqid + 1
        self._backend.changed()

    def reconfigure(self, minor: int, cache: int) -> TracerRecord:
        """Memory for the index in bytes, 0 for the default."""
        record = self._find_closed(minor)
        self._refuse_failed(record)
        if record.state.is_active and record.device is not None:
            self._backend.ask(record.device, "cache", cache=cache)
        record.cache = cache
        self._backend.changed()
        return record

    def get_free_minor(self) -> int:
        """The lowest free minor. NotFoundError (ENOENT) if there is none."""
        for minor in range(self._backend.limit()):
            if minor not in self.tracers:
                return minor
        raise NotFoundError("all minors are in use", errno=ENOENT, hint="stasis settings set tracer_maximum_count=255")

    def expand_cow_file(self, minor: int, size: int) -> TracerRecord:
        """Give the COW file `size` MiB more."""
        length = self._check_size(size)
        record = self.find(minor)
        device = self._active(record, State.ACTIVE_SNAPSHOT, "expand-cow-file")
        try:
            record.take(self._backend.ask(device, "expand", length=length))
        finally:
            self._refresh(record)
            self._backend.changed()
        return record

    def reconfigure_auto_expand(self, minor: int, step: int, reserved: int = 0) -> TracerRecord:
        """Let a full COW file grow by `step` MiB while `reserved` MiB stay free on its file system; 0 ends that."""
        lengths = self._check_size(step), self._check_size(reserved)
        record = self.find(minor)
        device = self._active(record, State.ACTIVE_SNAPSHOT, "reconfigure-auto-expand")
        self._backend.ask(device, "autoexpand", step=lengths[0], reserved=lengths[1])
        record.auto_expand = (step, reserved) if step else None
        self._backend.changed()
        return record

    # -- what happens to devices ------------------------------------------------------------------------

    def of_device(self, name: str, path: str, key: tuple[str, int, int]) -> TracerRecord | None:
        """The tracer that a device which is served from now on goes on with: its own, or one that was reloaded."""
        mine = [record for record in self.tracers.values() if record.key == key and not (record.error or record.mark)]
        for record in sorted(mine, key=lambda record: record.state.is_unverified):
            record.device, record.bdev = name, path
            return record
        return None

    def unseen(self) -> list[TracerRecord]:
        """Tracers of which, should their device be served, its worker has not said yet how they go on."""
        return [record for record in self.tracers.values() if record.device is not None
                and not (record.state.is_active or record.resting or record.error)]

    def woke(self, record: TracerRecord, described: Mapping[str, Any]) -> None:
        """The device is served; its worker says how the tracer goes on, or why it does not."""
        if not described.get("error") and not record.error and not record.state.is_active:
            record.state, record.resting = move(record.state, Move.WAKE), False
        record.take(described)
        self._backend.changed()

    def slept(self, name: str) -> None:
        """The device is served no more; its COW file was left clean."""
        for record in self.tracers.values():
            if record.device == name:
                record.resting = False
                if record.state.is_active:
                    record.state = move(record.state, Move.SLEEP)
        self._backend.changed()

    def rested(self, record: TracerRecord) -> None:
        """The device is served on, but nobody has it mounted."""
        record.state, record.resting = move(record.state, Move.SLEEP), True
        self._backend.changed()

    def forget(self) -> None:
        """Another daemon begins: nothing is known of what happened meanwhile."""
        for record in self.tracers.values():
            record.state, record.resting = move(record.state, Move.FORGET), False
