# SPDX-License-Identifier: Apache-2.0
"""What is said about an image that cannot be what it claims to be: file, offset and reason."""

from __future__ import annotations

from stasis.errors import DamagedError

__all__ = ["damaged"]


def damaged(path: str, offset: int, reason: str) -> DamagedError:
    """The error for a file that is wrong at `offset`, in bytes."""
    return DamagedError(f"{path} is damaged at byte {offset}: {reason}",
                        hint="dump again, or take the image set from where it came from")
