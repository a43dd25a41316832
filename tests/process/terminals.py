# SPDX-License-Identifier: Apache-2.0
"""Terminals come back with the numbers that they had. Tests that run side by side are kept from each other's."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

__all__ = ["low_numbers_taken"]


@contextlib.contextmanager
def low_numbers_taken() -> Iterator[contextlib.ExitStack]:
    """Whoever opens a terminal meanwhile gets a high number, drawn anew each time; others get the lowest free one.
    What is given ends it, too, by `close`."""
    with contextlib.ExitStack() as taken:
        for _ in range(random.SystemRandom().randrange(20, 200)):
            taken.callback(os.close, os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
        yield taken
