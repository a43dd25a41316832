# SPDX-License-Identifier: Apache-2.0
"""The methods of org.stasis.varlink that are dattobd's calls; the rest is in service.py."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from stasis.daemon import model
from stasis.daemon.answering import method
from stasis.daemon.devices import DeviceKeeper
from stasis.datto.registry import TracerRecord
from stasis.errors import UsageError

__all__ = ["DattoMethods", "tracer"]

Answer = dict[str, Any]


def tracer(record: TracerRecord) -> model.Tracer:
    """A tracer as the control API tells of it."""
    step, reserved = record.auto_expand or (0, 0)
    own = {field.name: getattr(record, field.name) for field in fields(model.Tracer) if hasattr(record, field.name)}
    return model.Tracer(**own | {"state": int(record.state), "state_name": str(record.state),
                                 "live": record.mark is not None,
                                 "node": None if record.node is None else str(record.node["node"]),
                                 "auto_expand_step": step, "auto_expand_reserved": reserved})


def _answer(record: TracerRecord) -> Answer:
    return {"tracer": model.as_dict(tracer(record))}


class DattoMethods:
    """Sizes have the units of libdattobd: bytes for caches, MiB for files."""

    _devices: DeviceKeeper

    @contextlib.contextmanager
    def _without_node(self, minor: int) -> Iterator[None]:
        """With the lock, and no kernel node that holds the image open; it is made again where there still is one."""
        tracers = self._devices.tracers
        try:
            with tracers.nodes.none_is_made(), self._devices.lock:
                tracers.nodes.release(minor)
                yield
        finally:
            tracers.nodes.settle()

    @method
    def DattoSetupSnapshot(self, members: Sequence[Mapping[str, Any]], fallocated_space: int | None,
                           cache_size: int | None) -> Answer:
        with self._devices.lock:
            wanted = [(int(member["minor"]), str(member["bdev"]), str(member["cow"])) for member in members]
            if not wanted:
                raise UsageError("no device is named", errno=errno.EINVAL)
            found = self._devices.tracers.setup(wanted, fallocated_space or 0, cache_size or 0)
        self._devices.tracers.nodes.settle()
        return {"tracers": [model.as_dict(tracer(record)) for record in found]}

    @method
    def DattoSetupLive(self, minor: int, bdev: str, cow: str, image: str) -> Answer:
        return _answer(self._devices.tracers.live.setup(minor, bdev, cow, image))

    @method
    def DattoReload(self, minor: int, bdev: str, cow: str, snapshot: bool, cache_size: int | None) -> Answer:
        with self._devices.lock:
            registry = self._devices.tracers.registry
            reload = registry.reload_snapshot if snapshot else registry.reload_incremental
            return _answer(reload(minor, bdev, cow, cache_size or 0))

    @method
    def DattoDestroy(self, minor: int) -> Answer:
        with self._without_node(minor):
            self._devices.tracers.registry.destroy(minor)
        return {}

    @method
    def DattoTransitionIncremental(self, minor: int) -> Answer:
        with self._without_node(minor):
            return _answer(self._devices.tracers.registry.transition_incremental(minor))

    @method
    def DattoTransitionSnapshot(self, minor: int, cow: str, fallocated_space: int | None) -> Answer:
        tracers = self._devices.tracers
        if tracers.live.owns(minor):
            return _answer(tracers.live.transition_snapshot(minor, cow, fallocated_space or 0))
        with self._without_node(minor):
            record = tracers.registry.transition_snapshot(minor, cow, fallocated_space or 0)
        return _answer(record)

    @method
    def DattoReconfigure(self, minor: int, cache_size: int | None) -> Answer:
        with self._without_node(minor):
            record = self._devices.tracers.registry.reconfigure(minor, cache_size or 0)
        return _answer(record)

    @method
    def DattoInfo(self, minor: int) -> Answer:
        with self._devices.lock:
            return _answer(self._devices.tracers.registry.find(minor))

    @method
    def DattoGetFreeMinor(self) -> Answer:
        with self._devices.lock:
            return {"minor": self._devices.tracers.registry.get_free_minor()}

    @method
    def DattoExpandCowFile(self, minor: int, size: int) -> Answer:
        with self._devices.lock:
            return _answer(self._devices.tracers.registry.expand_cow_file(minor, size))

    @method
    def DattoReconfigureAutoExpand(self, minor: int, step_size: int, reserved_space: int | None) -> Answer:
        with self._devices.lock:
            registry = self._devices.tracers.registry
            return _answer(registry.reconfigure_auto_expand(minor, step_size, reserved_space or 0))

    @method
    def DattoDistrust(self, minor: int) -> Answer:
        with self._devices.lock:
            self._devices.tracers.registry.distrust(minor)
        return {}

    @method
    def DattoList(self) -> Answer:
        found = self._devices.tracers.refresh()
        return {"tracers": [model.as_dict(tracer(record)) for record in found]}
