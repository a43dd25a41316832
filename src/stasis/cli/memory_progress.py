# SPDX-License-Identifier: Apache-2.0
"""The line on a terminal that tells how far the memory of a process tree has been copied."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stasis.units import format_size

__all__ = ["memory_progress"]

CLEAR = "\r\x1b[K"
PATIENCE = 0.5
"""Seconds in which nothing is shown: most trees are copied sooner."""


@contextmanager
def memory_progress(done: str, *, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What shows how many bytes are `done` ("copied"), on a line that is gone in the end; None without a terminal."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    began = time.monotonic()

    def show(part: int, whole: int) -> None:
        if (seconds := time.monotonic() - began) < PATIENCE:
            return
        share = 100 * part // whole if whole else 0
        text = f"{done} {format_size(part)} of {format_size(whole)} ({share} %), {format_size(int(part / seconds))}/s"
        os.write(2, f"{CLEAR}{text}".encode())

    try:
        yield show
    finally:
        if time.monotonic() - began >= PATIENCE:  # perhaps another process of ours drew it
            os.write(2, CLEAR.encode())
