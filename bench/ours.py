# SPDX-License-Identifier: Apache-2.0
"""stasis as a user runs it: its command line, its daemon, the URIs that it prints."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lab import Lab, LabError, wait_for

import stasis

__all__ = ["Stasis"]


class Stasis:
    """A daemon of its own in the lab, and the commands that go to it."""

    def __init__(self, lab: Lab, name: str = "st") -> None:
        self._lab = lab
        self._run_dir = lab.directory / f"{name}-run"
        self._state_dir = lab.directory / f"{name}-state"
        for directory in (self._run_dir, self._state_dir):
            lab.on_exit(partial(shutil.rmtree, directory, ignore_errors=True))

    def start(self) -> Stasis:
        """Start the daemon; it ends with the lab's scope, after its devices are detached."""
        process = self._lab.start(self.command("daemon"))
        # Clean-up is last in first out: this comes before the daemon's process is ended.
        self._lab.on_exit(self._stop)
        control = self._run_dir / "control.sock"
        wait_for(control.exists, "stasis daemon", process)
        return self

    def command(self, *words: str | Path) -> list[str]:
        """The words of a command on this daemon's directories."""
        places = ["--run-dir", str(self._run_dir), "--state-dir", str(self._state_dir)]
        group, *rest = [str(word) for word in words]
        return [sys.executable, "-m", "stasis", group, *rest, *places]

    def call(self, *words: str | Path) -> str:
        """Run a command; its output without the newline."""
        return self._lab.run(self.command(*words)).strip()

    def ask(self, *words: str | Path) -> Any:
        """Run a command with --json."""
        return json.loads(self.call(*words, "--json"))

    def variables(self) -> list[str]:
        """NAME=VALUE of the environment that leads other commands to this daemon."""
        return [f"STASIS_RUN_DIR={self._run_dir}", f"STASIS_STATE_DIR={self._state_dir}"]

    def client(self) -> stasis.Client:
        """A connection to this daemon, which runs."""
        return stasis.connect(self._run_dir, self._state_dir, start_daemon=False)

    def attach(self, path: Path, name: str, *options: str) -> str:
        """Serve an origin; the NBD URI."""
        return self.call("device", "attach", path, "--name", name, *options)

    def _stop(self) -> None:
        """End workers, image servers and the daemon; also those that outlived a daemon which was killed."""
        try:
            self.call("device", "list")  # where the daemon is gone this starts one, which adopts what is left
            self.call("daemon", "stop", "--force")
        except LabError as error:
            print(f"clean-up: {error}", file=sys.stderr)

    def take(self, devices: Sequence[str], storage: Path, *options: str) -> str:
        """Create a snapshot and take it; its UUID."""
        return self.call("snapshot", "create", "--storage", storage, *options, *devices, "--take")

    def show(self, uuid: str) -> Any:
        """What is known of a snapshot. Raises LabError when it is corrupted: a figure of it would mean
        nothing."""
        found = self.ask("snapshot", "show", uuid)
        if found["error_code"]:
            raise LabError(f"snapshot {uuid} is corrupted: {found['error_code']}")
        return found

    def connect(self) -> stasis.Client:
        """The Python interface to this daemon; no command has to be started for a call."""
        return stasis.connect(self._run_dir, self._state_dir, start_daemon=False)

    def image_uri(self, uuid: str) -> str:
        """The URI of the image of the snapshot's first device."""
        return str(self.show(uuid)["devices"][0]["uri"])

    def destroy(self, uuid: str) -> None:
        """Drop a snapshot and its storage."""
        self.call("snapshot", "destroy", uuid)

    def worker_pid(self, name: str) -> int:
        """The process that serves an origin."""
        return int(json.loads((self._run_dir / "workers" / f"{name}.json").read_text())["pid"])
