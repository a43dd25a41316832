# SPDX-License-Identifier: Apache-2.0
"""Filters answer with the errnos of the kernel's block-device filter mechanism."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import pytest

from stasis.block.filters import Filter, FilterKind, FilterRegistry, FilterSlot
from stasis.errors import StasisError


class _Tracker(Filter):
    commands = ("info",)

    def __init__(self) -> None:
        self.detached = False
        self.refuses = False

    def detach(self) -> None:
        if self.refuses:
            raise StasisError("in a snapshot", errno=errno.EBUSY)
        self.detached = True

    def ctl(self, command: str, argument: Mapping[str, Any]) -> dict[str, Any]:
        return {"command": command, **argument}


class _Kind(FilterKind[str]):
    def __init__(self, name: str) -> None:
        self.name = name
        self.made: list[_Tracker] = []

    def attach(self, device: str) -> Filter:
        if device == "broken":
            raise StasisError("no such origin", errno=errno.EIO)
        self.made.append(_Tracker())
        return self.made[-1]


@pytest.fixture
def kind() -> _Kind:
    return _Kind("tracker")


@pytest.fixture
def registry(kind: _Kind) -> FilterRegistry[str]:
    registry: FilterRegistry[str] = FilterRegistry()
    registry.register(kind)
    registry.register(_Kind("other"))
    return registry


@pytest.fixture
def slot() -> FilterSlot[str]:
    return FilterSlot("device", "/dev/sdx")


def _errno(call: Any, *arguments: Any) -> int:
    with pytest.raises(StasisError) as raised:
        call(*arguments)
    assert raised.value.message
    return raised.value.errno


def test_what_is_attached_can_be_asked_and_taken_off(
    registry: FilterRegistry[str], kind: _Kind, slot: FilterSlot[str]
) -> None:
    registry.attach(slot, "tracker")
    assert registry.ctl(slot, "tracker", "info", {"x": 1}) == {"command": "info", "x": 1}
    registry.detach(slot, "tracker")
    assert kind.made[0].detached
    registry.attach(slot, "other")
    assert slot.kind == "other"


def test_attach_errnos(registry: FilterRegistry[str], slot: FilterSlot[str]) -> None:
    assert _errno(registry.attach, slot, "unknown") == errno.ENOENT
    registry.attach(slot, "tracker")
    assert _errno(registry.attach, slot, "tracker") == errno.EALREADY
    assert _errno(registry.attach, slot, "other") == errno.EBUSY
    slot.gone = True
    assert _errno(registry.attach, slot, "tracker") == errno.ENODEV


def test_detach_errnos(registry: FilterRegistry[str], slot: FilterSlot[str]) -> None:
    assert _errno(registry.detach, slot, "tracker") == errno.ENOENT
    registry.attach(slot, "tracker")
    assert _errno(registry.detach, slot, "other") == errno.EINVAL
    slot.gone = True
    assert _errno(registry.detach, slot, "tracker") == errno.ENODEV


def test_ctl_errnos(registry: FilterRegistry[str], slot: FilterSlot[str]) -> None:
    assert _errno(registry.ctl, slot, "tracker", "info", {}) == errno.ENOENT
    registry.attach(slot, "tracker")
    assert _errno(registry.ctl, slot, "other", "info", {}) == errno.EINVAL
    assert _errno(registry.ctl, slot, "tracker", "unknown", {}) == errno.ENOTTY
    slot.gone = True
    assert _errno(registry.ctl, slot, "tracker", "info", {}) == errno.ENODEV


def test_a_failed_attach_leaves_the_slot_free(registry: FilterRegistry[str]) -> None:
    slot = FilterSlot("broken", "/dev/sdx")
    assert _errno(registry.attach, slot, "tracker") == errno.EIO
    assert slot.filter is None
    assert _errno(registry.detach, slot, "tracker") == errno.ENOENT


def test_a_filter_that_refuses_to_go_stays(
    registry: FilterRegistry[str], kind: _Kind, slot: FilterSlot[str]
) -> None:
    registry.attach(slot, "tracker")
    kind.made[0].refuses = True
    assert _errno(registry.detach, slot, "tracker") == errno.EBUSY
    assert registry.ctl(slot, "tracker", "info", {}) == {"command": "info"}


def test_kinds_come_and_go(registry: FilterRegistry[str], slot: FilterSlot[str]) -> None:
    assert registry.names() == ["other", "tracker"]
    assert _errno(registry.register, _Kind("tracker")) == errno.EBUSY
    registry.attach(slot, "tracker")
    registry.unregister("tracker")
    assert _errno(registry.unregister, "tracker") == errno.ENOENT
    registry.detach(slot, "tracker")
    assert _errno(registry.attach, slot, "tracker") == errno.ENOENT
