# SPDX-License-Identifier: Apache-2.0
"""A request that needs an image to be closed does not meet a node of it that is just being made."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stasis.daemon import datto_nodes
from stasis.daemon.datto_nodes import TracerNodes
from stasis.datto.registry import Registry, TracerRecord
from stasis.datto.states import State
from tests.datto.test_registry import FakeBackend

LONG_ENOUGH_TO_BE_WRONG = 0.2


def test_a_node_that_is_being_made_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the image open before its record says so: a transition was refused as if somebody read the image."""
    seen: list[str] = []
    backend = FakeBackend()
    registry = Registry(backend)
    registry.tracers[0] = TracerRecord(0, "sda", "/cow", State.ACTIVE_SNAPSHOT, ("block", ord("a"), 0), "sda")
    device: Any = SimpleNamespace(node={"node": "/dev/x"}, child=None, size=512)
    directories: Any = SimpleNamespace(nbd_socket=lambda name: tmp_path / name)
    nodes = TracerNodes(directories, registry, backend, {"sda": device}, threading.RLock())

    def request() -> None:
        with nodes.none_is_made():
            seen.append("request")

    asking = threading.Thread(target=request)

    def make(*_: object) -> dict[str, object]:
        asking.start()
        asking.join(LONG_ENOUGH_TO_BE_WRONG)
        seen.append("node")
        return {"node": "/dev/y"}

    monkeypatch.setattr(datto_nodes, "DEVICES", str(tmp_path))
    monkeypatch.setattr("stasis.daemon.nodes.make", make)
    nodes.settle()
    asking.join()
    assert seen == ["node", "request"]
