# SPDX-License-Identifier: Apache-2.0
"""Minors for tests whose snapshots are block devices: /dev/dattoN is one name for the whole machine, and tests run side
by side."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

LAST = 23
"""The highest minor with default settings."""


@contextmanager
def free_minor() -> Iterator[int]:
    """A minor that no other test has meanwhile, and whose name under /dev is free."""
    with socket.socket(socket.AF_UNIX) as claim:
        number = LAST
        while not _is_ours(claim, number):
            number -= 1
            assert number, "all minors are taken"
        yield number


def _is_ours(claim: socket.socket, number: int) -> bool:
    if os.path.lexists(f"/dev/datto{number}"):
        return False
    try:
        claim.bind(f"\0stasis-test-datto{number}")  # ends with the process
    except OSError:
        return False
    return True
