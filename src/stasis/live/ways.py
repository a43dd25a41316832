# SPDX-License-Identifier: Apache-2.0
"""What a way to a point in time is: a provider, and what it gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Point", "Provider"]


@dataclass
class Point:
    """The contents of a file or device at one instant, to be read from fd.

    release: takes away what else there is of it; why that cannot be, empty if nothing is left. failed: why a read may
    have failed that is no fault of the device, empty if it is one.
    """

    fd: int
    release: Callable[[], str] = lambda: ""
    failed: Callable[[], str] = lambda: ""

    def close(self) -> str:
        """Give it back; what `release` says."""
        os.close(self.fd)
        return self.release()


class Provider(Protocol):
    """A way to the contents of a file or device at one instant."""

    name: str

    def why_not(self, path: str) -> str:
        """Why it cannot be had there; empty if it can. Found out by trying, as far as that harms nobody."""

    def take(self, path: str) -> Point:
        """The contents now. Raises OSError, StasisError."""
