# SPDX-License-Identifier: Apache-2.0
"""What of a process tree cannot be kept: all of it, of all tasks, told at once and before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stasis.errors import UnsupportedError

__all__ = ["Finding", "Findings"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that stands in the way of a dump. `option` gets around it, where there is one. `passes`: it may be gone
    in a moment, when the tree has run on."""

    pid: int
    resource: str
    reason: str
    option: str = ""
    passes: bool = False

    def __str__(self) -> str:
        way = f" ({self.option})" if self.option else ""
        return f"process {self.pid}: {self.resource}: {self.reason}{way}"


class Findings:
    """All findings of a dump."""

    def __init__(self) -> None:
        self._found: list[Finding] = []

    @property
    def pass_by(self) -> bool:
        """Whether there are some, and all may be gone in a moment."""
        return bool(self._found) and all(finding.passes for finding in self._found)

    def add(self, pid: int, resource: str, reason: str, option: str = "", *, passes: bool = False) -> None:
        """Note something; the same thing twice counts once."""
        finding = Finding(pid, resource, reason, option, passes)
        if finding not in self._found:
            self._found.append(finding)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def refuse(self) -> None:
        """Raise UnsupportedError that lists everything, if there is anything."""
        if self._found:
            raise UnsupportedError(_sentence(self._found), hint=_hint(self._found))


def _sentence(found: Sequence[Finding]) -> str:
    if len(found) == 1:
        return f"it cannot be dumped: {found[0]}"
    return f"it cannot be dumped, for {len(found)} reasons:\n" + "\n".join(f"  {finding}" for finding in found)


def _hint(found: Sequence[Finding]) -> str:
    options = sorted({finding.option for finding in found if finding.option})
    return f"try {' '.join(options)}" if options else "nothing was changed; stasis process check PID lists this again"
