# SPDX-License-Identifier: Apache-2.0
"""Backs up the disk that "/" lies on, and notes every file that is there at the freeze. A program of its own.

It is run with the disk as its own root: all that it loads comes from there, its state directory and its working
directory lie there, and another process creates, renames and deletes files there all the time.

    rootdisk.py DEVICE FOLDER FREEZE TOP             FOLDER, on another file system, gets repository, lists and image
    rootdisk.py DEVICE FOLDER FREEZE TOP SIGNAL      ends itself so when all is frozen

TOP is the directory whose files are noted, "/" or that of the files that are written (STASIS_STATE_DIR with "-files").

Prints one line of JSON per backup: {"image", "list", "kind", "attempts", "milliseconds", "consistency", "warnings"};
in the second case the process id of who writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRITER = """
import itertools, os, random
draw = random.Random(1)
for number in itertools.count():
    place = f"dir{number % 7}"
    os.makedirs(place, exist_ok=True)
    with open(f"{place}/new", "wb") as file:
        file.write(draw.randbytes(draw.randrange(20000)))
        if not number % 4:
            os.fsync(file.fileno())
    os.rename(f"{place}/new", f"{place}/file{draw.randrange(20)}")
    if not number % 11:
        for name in os.listdir(place):
            os.unlink(f"{place}/{name}")
        os.rmdir(place)
    if number == 100:
        print("busy", flush=True)
"""
COVERED = "another file system is mounted over it"
HASHED_FIELDS = 4
"""Spaces in what is said of a file whose contents count."""
HASHED = 64 << 10
"""Bytes of each file that is being written that are read at the freeze; of others the length and time must do."""


def entries(top: str, deep: str) -> Iterator[tuple[str, str]]:
    """(path below top, what is to be the same) of everything on the file system that top lies on.

    Contents count below `deep`, a path below top, or everywhere if that is empty.
    """
    device = os.lstat(top).st_dev
    for folder, folders, files in os.walk(top):
        here = os.path.relpath(folder, top)
        for name in (*files, *list(folders)):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if status.st_dev != device:
                folders[:] = [one for one in folders if one != name]
                yield f"{here}/{name}", COVERED
                continue
            what = f"{status.st_mode:o} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
            if name in files and (not deep or f"{here}/".startswith(f"{deep}/")):
                with open(path, "rb", buffering=0) as file:
                    what += f" {hashlib.sha256(file.read(HASHED)).hexdigest()}"
            yield f"{here}/{name}", what


@contextlib.contextmanager
def written(where: Path) -> Iterator[int]:
    """Somebody works in a folder until the end."""
    where.mkdir(exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", WRITER], cwd=where, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
            yield process.pid
        finally:
            process.kill()


def stasis(*words: str) -> str:
    """A command in this process; its output."""
    from stasis.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(list(words))
    assert code == 0, (words, code)
    return out.getvalue()


def back_up(device: str, folder: Path, top: str, deep: str, freeze: str) -> dict[str, Any]:
    """One backup, with the list of files at the freeze, and the image restored from it."""
    from stasis.live.source import LiveSource

    found: dict[str, str] = {}
    original = LiveSource.switch

    def switch(source: LiveSource) -> None:
        """Called while everything rests."""
        found.clear()
        found.update(entries(top, deep))
        original(source)

    LiveSource.switch = switch  # type: ignore[method-assign]
    try:
        out = stasis("backup", "create", device, "--repo", str(folder / "repo"), "--json", "--max-freeze", freeze,
                     "--busy-freeze", freeze)
    finally:
        LiveSource.switch = original  # type: ignore[method-assign]
    made = json.loads(out.splitlines()[-1])
    backup = made["backups"][0]
    image, listed = folder / f"{backup['id'][:8]}.img", folder / f"{backup['id'][:8]}.json"
    listed.write_text(json.dumps(found))
    stasis("backup", "restore", backup["id"], str(image), "--repo", str(folder / "repo"))
    numbers = backup["statistics"]
    return {"image": str(image), "list": str(listed), "kind": backup["kind"], "consistency": backup["consistency"],
            "attempts": numbers["freeze_attempts"], "milliseconds": numbers["freeze_milliseconds"],
            "warnings": made["warnings"]}


def end(device: str, folder: Path, freeze: str, files: str, number: int) -> None:
    """Be stopped or killed while all is frozen."""
    from stasis.live.source import LiveSource

    stasis("repo", "init", str(folder / "repo"), "--no-encryption")
    stasis("track", "start", device)
    with written(Path(files)) as writer:
        print(json.dumps(writer), flush=True)
        LiveSource.switch = lambda _: os.kill(os.getpid(), number)  # type: ignore[method-assign]
        stasis("backup", "create", device, "--repo", str(folder / "repo"), "--max-freeze", freeze)


def main() -> None:
    """Two backups: one of everything, one of what changed."""
    device, folder, freeze, top = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    files = f"{os.environ['STASIS_STATE_DIR']}-files"
    deep = files.strip("/") if top == "/" else ""
    if len(sys.argv) > 5:
        end(device, folder, freeze, files, signal.Signals[sys.argv[5]])
        return
    stasis("repo", "init", str(folder / "repo"), "--no-encryption")
    stasis("track", "start", device)
    try:
        with written(Path(files)):
            for _ in range(2):
                print(json.dumps(back_up(device, folder, top, deep, freeze)), flush=True)
    finally:
        stasis("track", "stop", os.path.basename(device))


if __name__ == "__main__":
    main()
