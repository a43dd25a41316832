# SPDX-License-Identifier: Apache-2.0
"""JSON state files: replaced atomically, and one sentence when one cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stasis.errors import StateError

__all__ = ["read", "write"]


def read(path: Path, hint: str) -> dict[str, Any]:
    """The object in the file. FileNotFoundError, or StateError with `hint` if it holds no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise StateError(f"the state file {path} cannot be read: {error}", hint=hint) from error
    if not isinstance(value, dict):
        raise StateError(f"the state file {path} holds no object", hint=hint)
    return value


def write(path: Path, value: dict[str, Any], *, durable: bool = False) -> None:
    """Put the object in place of the file's contents. `durable` costs a flush and survives a power cut."""
    temporary = path.with_suffix(".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(json.dumps(value))
        file.flush()
        if durable:
            os.fsync(fd)
    os.replace(temporary, path)
