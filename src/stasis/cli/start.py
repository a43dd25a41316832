# SPDX-License-Identifier: Apache-2.0
"""Where the console scripts begin: Ctrl-C ends them with status 130 and one line, also while modules are imported."""

from __future__ import annotations

import sys

__all__ = ["blksnap", "criu", "dbdctl", "stasis", "update_img"]


def stasis() -> int:
    """The `stasis` command."""
    return _run("stasis", "stasis.cli.main")


def criu() -> int:
    """The `stasis-criu` command."""
    return _run("stasis-criu", "stasis.cli.criu")


def dbdctl() -> int:
    """The `dbdctl` command."""
    return _run("dbdctl", "stasis.cli.dbdctl")


def update_img() -> int:
    """The `update-img` command."""
    return _run("update-img", "stasis.cli.update_img")


def blksnap() -> int:
    """The `blksnap` command."""
    return _run("blksnap", "stasis.cli.blksnap.main")


def _run(name: str, module: str) -> int:
    try:
        __import__(module)
        return int(sys.modules[module].main())
    except KeyboardInterrupt:
        return _interrupted(name)
    except RuntimeError as error:
        # Up to Python 3.11 what is raised while an enumeration is made comes out as this (python/cpython issue 77757).
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        return _interrupted(name)


def _interrupted(name: str) -> int:
    print(f"{name}: interrupted", file=sys.stderr)
    return 130  # ExitCode.INTERRUPTED, of a module that may not be imported yet
