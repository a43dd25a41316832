# SPDX-License-Identifier: Apache-2.0
"""How a copy tells how far it is: a function of (bytes done, bytes in all), and a JSON-lines form of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["JsonLines", "Progress"]

Progress = Callable[[int, int], None]
LINE_SECONDS = 1.0


class JsonLines:
    """A progress function that writes one JSON object per line: ``message_type`` is ``status``, then
    ``summary``.

    Status lines carry ``bytes_done``, ``bytes_total``, ``percent`` and ``seconds_elapsed``, at most one per
    second.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._last = -LINE_SECONDS

    def __call__(self, done: int, total: int) -> None:
        elapsed = time.monotonic() - self._started
        if elapsed - self._last < LINE_SECONDS:
            return
        self._last = elapsed
        percent = round(100 * done / total, 2) if total else 100.0
        self.write(
            message_type="status",
            bytes_done=done,
            bytes_total=total,
            percent=percent,
            seconds_elapsed=round(elapsed, 3),
        )

    def write(self, **fields: Any) -> None:
        """Write one line at once; ``json_lines.write(**result.as_dict())`` ends the stream with the
        summary."""
        print(json.dumps(fields), file=self._stream, flush=True)
