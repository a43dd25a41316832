# SPDX-License-Identifier: Apache-2.0
"""Tracking from an initramfs, before the root is mounted: what has to be in it, and the step that it runs.

`python -m stasis.live.initramfs STATE` prints the files to copy, `--script` a shell script that makes the step, and
`--start` makes it. packaging/initramfs-tools and packaging/dracut do so.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from stasis.live import devicefile, lasting

__all__ = ["files", "main", "script", "start"]

# Interpreter start-up reads these before a module of ours can be asked what it needs.
FIRST = ("encodings", "encodings.ascii", "encodings.latin_1", "encodings.utf_8", "codecs", "io", "os", "runpy")


def files(state: Path) -> list[str]:
    """Absolute paths of interpreter, modules (with what is compiled of them) and records, all to be found at the same
    places in the initramfs. Shared libraries of the interpreter and of modules are not among them."""
    found = {os.path.realpath(sys.executable), *_modules()}
    found |= {str(path) for path in devicefile.root(state).glob("*/device.json")}
    return sorted(found)


def _modules() -> set[str]:
    for name in FIRST:
        __import__(name)
    found = set()
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or _frozen(name)
        cached = getattr(module, "__cached__", None)
        found |= {os.path.abspath(one) for one in (path, cached) if one and os.path.exists(one)}
    return found


def _frozen(name: str) -> str:
    """The source of a module that the interpreter has within; it is looked for to find the library."""
    return os.path.join(sysconfig.get_path("stdlib"), *name.split(".")) + ".py"


def _search_path() -> list[str]:
    """Where modules are that are none of Python's own."""
    own = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    modules = [path for path in _modules() if not path.startswith(own) or "-packages" in path]
    return [entry for entry in map(os.path.abspath, filter(None, sys.path))
            if entry not in own and any(path.startswith(f"{entry}/") for path in modules)]


def script(state: Path) -> str:
    """A shell script that starts tracking with what `files` named. It never fails, so that a machine always boots."""
    python, path = os.path.realpath(sys.executable), ":".join(_search_path())
    return (f"#!/bin/sh\nPYTHONPATH='{path}' PYTHONDONTWRITEBYTECODE=1 '{python}' -S -s "
            f"-m stasis.live.initramfs --start '{state}' || true\n")


def start(state: Path) -> None:
    """Start tracking the devices that are there, and print what became of each."""
    for name, said in lasting.resume_early(state, wait=False):
        print(f"stasis: {name}: {said}", flush=True)


def main(arguments: list[str]) -> None:
    """The module as a command."""
    state = Path(arguments[-1])
    if arguments[0] == "--start":
        start(state)
    elif arguments[0] == "--script":
        print(script(state), end="")
    else:
        print("\n".join(files(state)))


if __name__ == "__main__":
    main(sys.argv[1:])
