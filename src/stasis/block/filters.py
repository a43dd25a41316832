# SPDX-License-Identifier: Apache-2.0
"""Filters: what is attached to a device and sees its I/O, one at a time, looked up by the name of its kind.

The rules and their errnos are those of the kernel's proposed block-device filter mechanism (BLKFILTER_ATTACH, _DETACH,
_CTL in the blksnap patch sets), so that a caller who knows one knows the other:

| call   | ENOENT             | EALREADY         | EBUSY           | EINVAL          | ENOTTY          | ENODEV      |
|--------|--------------------|------------------|-----------------|-----------------|-----------------|-------------|
| attach | no filter so named | same one again   | another is there| -               | -               | device gone |
| detach | nothing attached   | -                | -               | another name    | -               | device gone |
| ctl    | nothing attached   | -                | -               | another name    | unknown command | device gone |
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from stasis.errors import BusyError, ExitCode, NotFoundError, StasisError, UnsupportedError, UsageError

__all__ = ["Filter", "FilterKind", "FilterRegistry", "FilterSlot"]


class Filter(ABC):
    """An attached filter."""

    commands: tuple[str, ...] = ()
    """What `ctl` understands; a filter without commands answers none."""

    @abstractmethod
    def detach(self) -> None:
        """Stop filtering and give everything back. If this raises, the filter stays attached."""

    @abstractmethod
    def ctl(self, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one of `commands`; the registry has checked that it is one."""


D = TypeVar("D")


class FilterKind(ABC, Generic[D]):
    """What can be attached: it has a name and makes filters for devices of type D."""

    name: str

    @abstractmethod
    def attach(self, device: D) -> Filter:
        """Put a filter on the device. If this raises, nothing is attached."""


class FilterSlot(Generic[D]):
    """The one place for a filter that every device has."""

    def __init__(self, device: D, label: str) -> None:
        self.device = device
        self.label = label
        self.kind: str | None = None
        self.filter: Filter | None = None
        self.gone = False
        """Set when the device itself has vanished; nothing but ENODEV answers from then on."""


class FilterRegistry(Generic[D]):
    """The kinds of filters that exist, and the calls on slots with their errnos."""

    def __init__(self) -> None:
        self._kinds: dict[str, FilterKind[D]] = {}

    def register(self, kind: FilterKind[D]) -> None:
        """Make a kind known. Raises BusyError (EBUSY) if its name is taken."""
        if kind.name in self._kinds:
            raise BusyError(f"a filter named {kind.name} is already registered", errno=errno.EBUSY)
        self._kinds[kind.name] = kind

    def unregister(self, name: str) -> None:
        """Forget a kind; filters of it that are attached stay. Raises NotFoundError (ENOENT)."""
        self._find(name)
        del self._kinds[name]

    def names(self) -> list[str]:
        return sorted(self._kinds)

    def _find(self, name: str) -> FilterKind[D]:
        try:
            return self._kinds[name]
        except KeyError:
            known = ", ".join(self.names()) or "none"
            raise NotFoundError(f"there is no filter named {name}", hint=f"known filters: {known}",
                                errno=errno.ENOENT) from None

    def attach(self, slot: FilterSlot[D], name: str) -> Filter:
        """Attach a filter of kind `name`. Raises with ENOENT, ENODEV, EALREADY or EBUSY, or what the kind raises."""
        kind = self._find(name)
        _check_present(slot)
        if slot.kind == name:
            raise BusyError(f"{slot.label} already has the filter {name}",
                            hint="one filter per device; stasis device list shows it", errno=errno.EALREADY)
        if slot.kind is not None:
            raise BusyError(f"{slot.label} already has another filter, {slot.kind}",
                            hint="one filter per device; detach it first", errno=errno.EBUSY)
        slot.filter = kind.attach(slot.device)
        slot.kind = name
        return slot.filter

    def detach(self, slot: FilterSlot[D], name: str) -> None:
        """Take the filter off. Raises with ENODEV, ENOENT or EINVAL, or whatever the filter raises (and then stays)."""
        _check_present(slot)
        _attached(slot, name).detach()
        slot.kind = slot.filter = None

    def ctl(self, slot: FilterSlot[D], name: str, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        """Pass a command to the filter. Raises with ENODEV, ENOENT, EINVAL or ENOTTY, or what the command raises."""
        _check_present(slot)
        filter_ = _attached(slot, name)
        if command not in filter_.commands:
            raise UnsupportedError(f"The filter {name} has no command {command}",
                                   hint=f"it has {', '.join(filter_.commands) or 'none'}", errno=errno.ENOTTY)
        return filter_.ctl(command, argument)


def _check_present(slot: FilterSlot[Any]) -> None:
    if slot.gone:
        raise StasisError(f"{slot.label} is gone",
                          hint="the device was removed; detach it, and attach it again when it is back",
                          exit_code=ExitCode.NOT_FOUND, errno=errno.ENODEV)


def _attached(slot: FilterSlot[Any], name: str) -> Filter:
    if slot.filter is None:
        raise NotFoundError(f"{slot.label} has no filter", hint="stasis device attach puts one on",
                            errno=errno.ENOENT)
    if slot.kind != name:
        raise UsageError(f"{slot.label} has the filter {slot.kind}, not {name}", errno=errno.EINVAL)
    return slot.filter
