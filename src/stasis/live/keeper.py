# SPDX-License-Identifier: Apache-2.0
"""A process that takes away what must not be left behind, whatever becomes of the one who made it.

It is started before the thing is made, and waits for the end of its standard input, which the death of its maker is.
Then it calls `undo` of the module that it was told, with what it was told. What is left when it is killed itself bears
its maker (`owner`) in its name; the next one who makes such a thing clears away what belongs to nobody any more.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from typing import Protocol

from stasis.errors import StasisError
from stasis.linux import process

__all__ = ["Keeper", "is_abandoned", "main", "owner"]

_OWNER = re.compile(r"([0-9]+)-([0-9]+)-([0-9a-f]{8})")


class Undoing(Protocol):
    """A module that can take away what it made."""

    def undo(self, **what: str) -> str:
        """Take it away if it is there; why that cannot be, empty if it is gone."""


class Keeper:
    """One thing that is to be taken away: by `close`, or by the process if we die."""

    def __init__(self, module: str, **what: str) -> None:
        """Start the process. StasisError if it does not come up."""
        self._module, self._what = module, what
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-m", "stasis.live.keeper"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd="/", text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"module": module, "what": what}) + "\n")
        self._process.stdin.flush()
        if self._read() != "ready":
            self.close()
            raise StasisError(f"the process that takes away {' '.join(what.values())} in the end did not start",
                              hint="run the command again")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def close(self) -> str:
        """Take it away; why that cannot be, empty if it is gone."""
        said, _ = self._process.communicate()
        if self._process.returncode:  # it was killed: do its work
            return _module(self._module).undo(**self._what)
        return said.strip()


def owner() -> str:
    """This process, as a part of a name."""
    return f"{os.getpid()}-{process.start_time(os.getpid())}-{process.boot_id()[:8]}"


def is_abandoned(name: str) -> bool:
    """Whether a name bears an owner that lives no more."""
    match = _OWNER.search(name)
    if match is None:
        return False
    return process.boot_id()[:8] != match[3] or process.start_time(int(match[1])) != int(match[2])


def main() -> None:
    """Wait for the end of the input, then undo."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    told = json.loads(sys.stdin.readline())
    module = _module(told["module"])
    print("ready", flush=True)
    sys.stdin.read()
    print(module.undo(**told["what"]), flush=True)


def _module(name: str) -> Undoing:
    module: Undoing = importlib.import_module(name)
    return module


if __name__ == "__main__":
    main()
