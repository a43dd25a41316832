# SPDX-License-Identifier: Apache-2.0
"""A control group that stands still while its processes are seized: none of them can fork meanwhile, however many it
has. Then they are held by ptrace alone, and the group runs; at the end it is frozen again if it was.

Both versions: `cgroup.freeze` (Documentation/admin-guide/cgroup-v2.rst) and `freezer.state` (cgroup-v1/freezer-
subsystem.rst). The guardian puts the group back should the dumper die.
"""

from __future__ import annotations

import mmap
import os
import time
from types import TracebackType
from typing import Self

from stasis.errors import NotFoundError, PermissionDeniedError, StasisError

__all__ = ["GroupFreezer"]

PAUSE = 0.001
UNTOUCHED, THAWED, FROZEN = range(3)
"""What the group is to be in the end."""
STATES = {"cgroup.freeze": ("0", "1"), "freezer.state": ("THAWED", "FROZEN")}


class GroupFreezer:
    """One group; a context manager that has it stand still. To be made before the guardian is forked."""

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        """`path`: the group's directory. NotFoundError where it cannot be frozen. `timeout`: seconds."""
        file = next((name for name in STATES if os.path.exists(os.path.join(path, name))), "")
        if not file:
            raise NotFoundError(f"{path} is no control group that can be frozen",
                                hint="name a directory with cgroup.freeze or freezer.state")  # fmt: skip
        self._path, self._file, self._timeout = path, os.path.join(path, file), timeout
        self._thawed, self._frozen = STATES[file]
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def __enter__(self) -> Self:
        was_frozen = _read(self._file) == self._frozen
        self._memory[0] = FROZEN if was_frozen else THAWED
        self._write(self._frozen)
        deadline = time.monotonic() + self._timeout
        while not self._is_frozen():
            if time.monotonic() > deadline:
                self.put_back()
                raise StasisError(
                    f"the control group {self._path} did not freeze within {self._timeout:g} seconds",
                    hint="a process of it may wait for a device or network file system; nothing was changed",
                )
            time.sleep(PAUSE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """All are seized: let the group run."""
        self._write(self._thawed)

    def put_back(self) -> None:
        """Have it as it was. Before its processes are let go, so that none runs that did not. May be called again."""
        state, self._memory[0] = self._memory[0], UNTOUCHED
        if state != UNTOUCHED:
            self._write(self._frozen if state == FROZEN else self._thawed)

    def _is_frozen(self) -> bool:
        if self._file.endswith("freezer.state"):
            return _read(self._file) == self._frozen
        return "frozen 1" in _read(os.path.join(self._path, "cgroup.events"))

    def _write(self, state: str) -> None:
        try:
            with open(self._file, "w") as file:
                file.write(state)
        except PermissionError as error:
            raise PermissionDeniedError(f"{self._file} may not be written", hint="run as root") from error


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()
