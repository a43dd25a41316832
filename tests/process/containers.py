# SPDX-License-Identifier: Apache-2.0
"""Programs in namespaces of their own, which unshare(1) makes: set up, dumped, restored, and asked to look at
themselves. See `programs.py`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stasis.linux import procfs
from tests.process.programs import compiled, stasis, wait_for

__all__ = ["PLACES", "WITHOUT_OTHERS", "Container", "contained_cycle", "container", "cycle_of_other_users",
           "setup_script"]


PLACES = ("/tmp/", "/dev/shm/", "/run/", "/sys/fs/bpf")
WITHOUT_OTHERS = (
    f"for one in $(cut -d' ' -f5 /proc/self/mountinfo | grep {' '.join(f'-e ^{place}' for place in PLACES)})\n"
    "do umount -l $one 2>/dev/null || :; done\n"
)
"""For a shell in a mount namespace of its own: away with mounts of other programs, which may go meanwhile."""


class Container:
    """The program: `pid` is that of its first process, outside."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory = directory
        self.pid = pid
        self.images = 0

    def dump(self, *options: str) -> Path:
        """Dump to a new image set."""
        self.images += 1
        images = self.directory / f"images-{self.images}"
        stasis("dump", self.pid, "--images", images, *options)
        if "--leave-running" not in options:
            wait_for(lambda: not os.path.exists(f"/proc/{self.pid}"), "the first process did not end")
        return images

    def restore(self, images: Path, *options: str) -> None:
        """Bring it back."""
        self.pid = int(stasis("restore", "--images", images, *options))

    def again_and_again(self) -> None:
        """Dump and restore. With STASIS_LONG twice, and once more with the program left running."""
        self.restore(self.dump())
        if os.environ.get("STASIS_LONG"):
            self.restore(self.dump())
            self.dump("--leave-running")

    def finish(self) -> None:
        """Let the program look at itself; it must be content."""
        (self.directory / "go").touch()
        wait_for(lambda: not lives(self.pid), f"process {self.pid} did not end")
        errors = (self.directory / "errors").read_text()
        assert not errors, errors
        assert (self.directory / "content").exists(), "the program ended before it had looked"

    def end(self) -> None:
        """Kill what is left of it."""
        if lives(self.pid) and os.readlink(f"/proc/{self.pid}/exe").endswith(("/program", "/busybox")):
            os.kill(self.pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return procfs.stat(pid).state not in "ZX"
    except ProcessLookupError:
        return False


def setup_script(directory: Path, before: str = "") -> Path:
    """A shell script that makes the mount namespace its own alone, does `before`, and becomes the program."""
    script = directory / "setup"
    script.write_text(f"{WITHOUT_OTHERS}{before}exec ./program\n")
    return script


def cycle_of_other_users(directory: Path) -> None:
    """The program of a directory, which others may write to, in a mount namespace: dumped and restored repeatedly."""
    for one in (directory.parent, directory):
        one.chmod(0o777)
    (directory / "data").mkdir()
    with container(directory, "--mount", "sh", setup_script(directory), depth=3) as program:
        (directory / "errors").chmod(0o666)
        program.again_and_again()
        program.finish()


@contextmanager
def container(directory: Path, *command: str | Path, depth: int = 1) -> Iterator[Container]:
    """What unshare(1) runs with these options and words, once it is set up: its child, or that one's and so on."""
    with (
        open(os.devnull, "rb") as nothing,
        open(directory / "errors", "ab") as errors,
        subprocess.Popen(
            ["unshare", "--fork", *map(str, command)], stdin=nothing, stdout=errors, stderr=errors,
            cwd=directory, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        found = Container(directory, 0)
        try:
            ready = directory / "ready"
            wait_for(lambda: ready.exists() or process.poll(), "the program is not set up")
            assert ready.exists(), (directory / "errors").read_text()
            found.pid = process.pid
            for _ in range(depth):
                (found.pid,) = procfs.children(found.pid, found.pid)
            process.kill()  # it would complain of the program's end
            process.wait()
            yield found
        finally:
            if found.pid:
                found.end()
            process.kill()


def contained_cycle(directory: Path, code: str, *flags: str) -> None:
    """Compile, set up in namespaces, dump and restore, and let the program look at itself."""
    with container(directory, *flags, compiled(directory, code)) as program:
        program.again_and_again()
        program.finish()
