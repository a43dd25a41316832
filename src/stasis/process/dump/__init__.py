# SPDX-License-Identifier: Apache-2.0
"""Dumping: a process tree written to an image set. The package can be called, as `stasis.process.dump(...)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Dump(ModuleType):
    """`stasis.process.dump(...)` is the function `dump` of `job`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from stasis.process.dump.job import dump

        return dump(*arguments, **options)


sys.modules[__name__].__class__ = _Dump
