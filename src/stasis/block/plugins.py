# SPDX-License-Identifier: Apache-2.0
"""What a room above the block engine adds to a worker: requests of its own, and a look at writes before they happen.

The worker's configuration names a module per plugin; its function `attach(host, state)` makes it. It is loaded when the
configuration has a state for it, or at its first request: `{"op": "NAME.REQUEST", ...}` on the control socket.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from errno import ENOTTY
from typing import Any, Protocol

from stasis.block.background import Background
from stasis.block.control import Connection, Message
from stasis.block.exports import OriginExport
from stasis.block.origin import Origin
from stasis.block.settings import Settings
from stasis.block.tracking import Opening, Tracker
from stasis.linux.eventloop import EventLoop

__all__ = ["Host", "Plugin", "Plugins"]


class Host(Protocol):
    """What a plugin may use of its worker."""

    name: str
    settings: Settings
    loop: EventLoop
    origin: Origin
    export: OriginExport
    tracker: Tracker | None
    opening: Opening | None
    background: Background

    def post(self, kind: str, **fields: object) -> None:
        """Send an event to whoever subscribed."""
        ...


class Plugin(ABC):
    """One room's part of a worker. All calls come from the event loop, between batches."""

    @abstractmethod
    def handle(self, request: str, connection: Connection, message: Message) -> None:
        """Answer a request. An OSError that is raised is the answer."""

    def tick(self) -> None:
        """About once a second."""

    def clear_intents(self) -> None:
        """As often as the worker makes its own marks durable."""

    def generation_changed(self) -> None:
        """The change map has another generation."""

    def resized(self) -> None:
        """The origin has another size, or is gone."""

    def stopping(self) -> None:
        """The worker is about to end, and to wait for its background jobs."""

    def stop(self) -> None:
        """The worker ends: nothing is written any more, background jobs are done. Called before the map is closed."""


class Plugins:
    """The plugins of one worker."""

    def __init__(self, host: Host, config: Mapping[str, Any]) -> None:
        self._host, self._config = host, config
        self.loaded: dict[str, Plugin] = {}
        for name, entry in config.items():
            if entry.get("state") is not None:
                self._load(name, entry["state"])

    def _load(self, name: str, state: Mapping[str, Any] | None) -> Plugin:
        module = importlib.import_module(self._config[name]["module"])
        plugin: Plugin = module.attach(self._host, state)
        self.loaded[name] = plugin
        return plugin

    def handle(self, connection: Connection, message: Message) -> None:
        """Hand a request to the plugin it is for. OSError ENOTTY if this worker knows none of that name."""
        name, _, request = str(message["op"]).partition(".")
        if name not in self._config:
            raise OSError(ENOTTY, f"unknown request {message['op']!r}")
        plugin = self.loaded.get(name) or self._load(name, None)
        plugin.handle(request, connection, message)

    def tick(self) -> None:
        for plugin in self.loaded.values():
            plugin.tick()

    def clear_intents(self) -> None:
        for plugin in self.loaded.values():
            plugin.clear_intents()

    def generation_changed(self) -> None:
        for plugin in self.loaded.values():
            plugin.generation_changed()

    def resized(self) -> None:
        for plugin in self.loaded.values():
            plugin.resized()

    def stopping(self) -> None:
        for plugin in self.loaded.values():
            plugin.stopping()

    def stop(self) -> None:
        for plugin in self.loaded.values():
            plugin.stop()
