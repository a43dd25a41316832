# SPDX-License-Identifier: Apache-2.0
"""Modules that a process of a restore may need later, when it is another user or has another root directory, and
cannot find them any more."""

from __future__ import annotations

import importlib
import pkgutil

__all__ = ["import_all"]

PACKAGES = ("stasis.process.files", "stasis.process.restore", "stasis.process.namespaces", "stasis.process",
            "stasis.process.images.schema")  # fmt: skip


def import_all() -> None:
    """All that a restore uses."""
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
