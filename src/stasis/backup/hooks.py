# SPDX-License-Identifier: Apache-2.0
"""Commands around the snapshot point: one that brings programs to rest, one that lets them go on.

The second one always runs once the first was started, whatever becomes of the snapshot: a database that was told to
wait must not wait for ever.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from stasis.errors import StasisError

__all__ = ["Hooks"]


class Hooks:
    """The commands of one run; they run in a shell, with STASIS_DEVICES and STASIS_BACKUP_SET in their environment."""

    def __init__(self, before: str | None, after: str | None, devices: Sequence[str], set_id: str) -> None:
        self.warnings: list[str] = []
        self._before, self._after = before, after
        self._environment = {**os.environ, "STASIS_DEVICES": " ".join(devices), "STASIS_BACKUP_SET": set_id}
        self._pending = False

    @property
    def given(self) -> bool:
        """Whether there is a command that brings programs to rest."""
        return self._before is not None

    def before(self) -> None:
        """Run the first command. Raises StasisError if it fails; then nothing must be done."""
        self._pending = True
        if self._before is None:
            return
        status = self._run(self._before)
        if status:
            self.after(failed=True)
            raise StasisError(f"the command before the snapshot failed ({_how(status)}): {self._before}",
                              hint="nothing was backed up; the command's own output says more")

    def after(self, *, failed: bool = False) -> None:
        """Run the second command, once. What goes wrong is a warning: the backup is as good as without it."""
        if not self._pending:
            return
        self._pending = False
        if self._after is None:
            return
        self._environment["STASIS_SNAPSHOT"] = "failed" if failed else "taken"
        status = self._run(self._after)
        if status:
            self.warnings.append(f"the command after the snapshot failed ({_how(status)}): {self._after}")

    def _run(self, command: str) -> int:
        # Standard output may carry our JSON, standard input the disk.
        return subprocess.run(["/bin/sh", "-c", command], env=self._environment, stdin=subprocess.DEVNULL, stdout=2,
                              check=False).returncode


def _how(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {-status}"
