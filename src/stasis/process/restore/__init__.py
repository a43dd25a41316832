# SPDX-License-Identifier: Apache-2.0
"""Restoring: a process tree made from an image set, from outside. The package can be called, as
`stasis.process.restore(...)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Restore(ModuleType):
    """`stasis.process.restore(...)` is the function `restore` of `job`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from stasis.process.restore.job import restore

        return restore(*arguments, **options)


sys.modules[__name__].__class__ = _Restore
