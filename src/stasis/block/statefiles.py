# SPDX-License-Identifier: Apache-2.0
"""Files of the state directory, whose file system may be full or broken: what fails there is said of the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from stasis.errors import StorageError

__all__ = ["writing"]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of what writes the state file `path` into a StorageError that names it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"the state file {path} cannot be written: {error.strerror}", errno=error.errno or 0,
                           hint="make room in the state directory; no change is lost") from error
