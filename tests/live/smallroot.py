# SPDX-License-Identifier: Apache-2.0
"""A disk with a small system on it, and processes that have it as their root: as on a machine that runs from it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import stasis
from stasis.linux import freeze
from tests.live.disks import MIB, image_file, loop, tool

__all__ = ["SmallRoot", "small_root"]

SIZE = 192 * MIB
LEFT_OUT = ("__pycache__", "test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "site-packages", "config-*",
            "*.a")
USED = """
import importlib, os, pkgutil, sys, stasis
for found in pkgutil.walk_packages(stasis.__path__, "stasis."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
names = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - {"stasis", "__main__"}
for name in names:
    if path := getattr(sys.modules[name], "__file__", None):
        print(os.path.dirname(path) if path.endswith("__init__.py") else path)
for line in open("/proc/self/maps"):
    path = line.split(maxsplit=5)[-1].strip()
    if path.startswith("/") and ".so" in path:
        print(path)
"""
ENTER = """
import os, subprocess, sys
from stasis.linux import libc
def mount(*words):
    subprocess.run(["mount", *words], check=True)
mount("--make-rprivate", "/")
mount(*sys.argv[1:])
os.chdir(sys.argv[2])
for name in ("proc", "sys", "dev", "old", "tmp", "run", "root"):
    os.makedirs(name, exist_ok=True)
for name in ("proc", "sys", "dev"):
    mount("--rbind", f"/{name}", name)
subprocess.run(["pivot_root", ".", "old"], check=True)
libc.check(libc.libc.umount2(b"/old", 2), "umount2")
print("up", flush=True)
sys.stdin.read(1)
"""


@dataclass
class SmallRoot:
    """Run programs with `command`: they have the disk as their root, which we see at `top`."""

    node: str
    top: Path
    command: list[str]
    environment: dict[str, str]


def _copy(path: str, top: Path) -> None:
    """To the same place below top; links on the way there are followed, so that the path leads there too."""
    target = top / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(path):
        shutil.copytree(path, target, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    else:
        shutil.copyfile(path, target)
        target.chmod(0o755)


def _fill(top: Path) -> list[str]:
    """Put Python, stasis and all that they load there; the places where Python finds it."""
    done = subprocess.run([sys.executable, "-c", USED], capture_output=True, text=True, check=True)
    packages = Path(stasis.__file__).parents[1]
    for path in {os.path.realpath(sys.executable), sysconfig.get_path("stdlib"), str(packages / "stasis"),
                 str(Path(__file__).with_name("rootdisk.py")), *done.stdout.split(), *_linked(done.stdout.split())}:
        _copy(path, top)
    libraries = {str(Path(path).parent) for path in done.stdout.split() if not path.endswith(".so")}
    return [str(packages), *sorted(path for path in libraries if path.endswith("-packages"))]


def _linked(used: list[str]) -> list[str]:
    """A shell, the program loader, and libraries by the names that they are asked for."""
    programs = [os.path.realpath(sys.executable), "/bin/sh", *(path for path in used if path.endswith(".so"))]
    words = tool("ldd", *programs).split()
    return ["/bin/sh", *(word for word in words if word.startswith("/") and not word.endswith(":"))]


@contextlib.contextmanager
def small_root(where: Path) -> Iterator[SmallRoot]:
    """An ext4 on a loop device, and a process in a mount namespace of its own that has it as its root."""
    with image_file(where, "root", SIZE) as image:
        tree = image.parent / "tree"
        found = _fill(tree)
        tool("mkfs.ext4", "-q", "-F", "-d", tree, image)
        shutil.rmtree(tree)
        (where / "root").mkdir()
        with loop(image) as node, _entered(node, where / "root") as pid:
            environment = {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": ":".join(found), "PATH": "/usr/bin:/bin",
                           "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
                           **{name: value for name, value in os.environ.items() if name.startswith("STASIS_TEST")}}
            python = os.path.realpath(sys.executable)
            command = ["nsenter", "-t", str(pid), "-m", "--", python]
            yield SmallRoot(node, Path(f"/proc/{pid}/root"), command, environment)


@contextlib.contextmanager
def _entered(node: str, directory: Path) -> Iterator[int]:
    with subprocess.Popen(["unshare", "--mount", sys.executable, "-c", ENTER, node, str(directory)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        fd = os.open(f"/proc/{process.pid}/root", os.O_RDONLY)
        try:
            yield process.pid
        finally:
            freeze.thaw(fd)  # whatever was found, nothing stays frozen
            os.close(fd)
            process.communicate("\n")
