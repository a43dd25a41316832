# SPDX-License-Identifier: Apache-2.0
"""How a method of the control API fails: whatever it raises becomes the interface's one error."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import varlink

from stasis.daemon.interface import NAME
from stasis.errors import StasisError

__all__ = ["failure", "method"]

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def failure(error: StasisError) -> Exception:
    """The error as varlink sends it."""
    wrapped: Exception = varlink.VarlinkError({"error": f"{NAME}.Failed", "parameters": error.as_dict()})
    return wrapped


def method(function: F) -> F:
    """Turn what a method raises into the interface's one error; nothing else may end a connection."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except StasisError as error:
            raise failure(error) from error
        except OSError as error:
            raise failure(_from_os(error)) from error
        except Exception as error:
            log.exception("%s failed in a way that nobody expected", function.__name__)
            text = f"the daemon failed: {type(error).__name__}: {error}"
            raise failure(StasisError(text, hint="this is a mistake in stasis; daemon.log has more")) from error

    return call  # type: ignore[return-value]


def _from_os(error: OSError) -> StasisError:
    where = f"{error.filename}: " if error.filename else ""
    return StasisError(f"{where}{error.strerror or error}", errno=error.errno or 0)
