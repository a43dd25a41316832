# SPDX-License-Identifier: Apache-2.0
"""The one error that live devices have of their own."""

from __future__ import annotations

from stasis.errors import GenerationError

__all__ = ["TrackingLostError"]


class TrackingLostError(GenerationError):
    """Changes may have been missed: nothing can be concluded any more, and the next copy must be a full one."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"changes of {device} may have been missed: {reason}",
                         hint="the next backup copies everything and starts a new generation")
