# SPDX-License-Identifier: Apache-2.0
"""qemu's tools at work for us: they know the formats of disk images, so that we need not.

qemu-nbd serves an image on a socket that we listen on before it starts, so there is nothing to wait for. It ends when
we hang up, and only then is an image that was written complete.

Paths are made absolute: qemu takes what stands before a colon in a relative one for a protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stasis.backup.streams.newfile import failure
from stasis.errors import NotFoundError, StasisError, UnsupportedError
from stasis.nbd.client import Client
from stasis.nbd.listeners import unix_listener
from stasis.nbd.uri import NbdUri

__all__ = ["ALLOCATION", "DEPTH", "create", "info", "serve"]

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
ANSWER_SECONDS = 120.0
END_SECONDS = 600.0  # to write back what it holds in memory, to a slow disk

# sd_listen_fds(3): the socket is descriptor 3, and LISTEN_PID must be that of the program itself.
ACTIVATE = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), "
            "LISTEN_FDS='1'); os.execvp(sys.argv[2], sys.argv[2:])")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UnsupportedError(f"{name} is not installed", hint="it is in Debian's package qemu-utils")
    return found


def _run(arguments: Sequence[str], what: str) -> str:
    result = subprocess.run([_tool("qemu-img"), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise StasisError(f"{what}: {_last_line(result.stderr)}")
    return result.stdout


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else "it does not say why"


def create(path: Path, size: int, backing: Path | None) -> None:
    """Make an empty qcow2 image of `size` bytes, on an image in the same directory if one is given."""
    options = ["-b", backing.name, "-F", "qcow2"] if backing else []
    _run(["create", "-q", "-f", "qcow2", *options, str(path.absolute()), str(size)], f"{path} cannot be made")


def info(path: Path, image_format: str) -> dict[str, Any]:
    """What qemu-img knows of an image, without looking at its backing files."""
    if not path.exists():
        raise NotFoundError(f"there is no {path}")
    said = _run(["info", "-U", "-f", image_format, "--output=json", str(path.absolute())], f"{path} cannot be read")
    found: dict[str, Any] = json.loads(said)
    return found


@contextlib.contextmanager
def serve(path: Path, image_format: str, *, writable: bool = False) -> Iterator[Client]:
    """A connection to an image; when the block ends well, what was written is on the disk."""
    options = ["--discard=unmap"] if writable else ["--read-only", "--allocation-depth"]
    command = [_tool("qemu-nbd"), f"--format={image_format}", *options, "--", str(path.absolute())]
    with tempfile.TemporaryDirectory(prefix="stasis-") as folder:
        address = f"{folder}/nbd"
        with contextlib.closing(unix_listener(address)) as listener:
            number = str(listener.fileno())
            started = subprocess.Popen([sys.executable, "-IS", "-c", ACTIVATE, number, *command],
                                       pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with _ended(started, path):
            contexts = () if writable else (ALLOCATION, DEPTH)
            with Client.connect(NbdUri(socket=address), contexts=contexts, timeout=ANSWER_SECONDS) as client:
                yield client


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str], path: Path) -> Iterator[None]:
    """Wait for qemu-nbd to end by itself, or end it after an error; what it said is the better reason."""
    broken: OSError | None = None
    try:
        yield
    except OSError as error:
        broken = error
    except BaseException:
        process.kill()
        raise
    finally:
        try:
            _, said = process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
    if broken is not None or process.returncode:
        reason = _last_line(said) if said.strip() or broken is None else os.strerror(broken.errno or 0)
        raise failure(f"{path}: {reason}", broken) from broken
