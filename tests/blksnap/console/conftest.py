# SPDX-License-Identifier: Apache-2.0
"""blksnap's tool as tests call it: in this process, or as scripts call it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from stasis.cli.blksnap.main import main
from tests.runner import Stasis

PLACES = {
    "<uuid>": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "<n>": r"[0-9]+",
    "<image>": r"(?:/dev/[a-z0-9]+|nbd\+unix:///\S+)",
    "<node>": r'(?:"/dev/[a-z0-9]+"|null)',
}
"""What a transcript writes for what differs from run to run."""


@dataclass(frozen=True)
class Said:
    """What a run of the tool came to."""

    code: int
    out: str
    err: str


class Tool:
    """The tool, on the directories of a runner of `stasis`."""

    def __init__(self, stasis: Stasis, directory: Path) -> None:
        self.stasis, self.directory = stasis, directory
        script = directory / "blksnap"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m stasis.cli.blksnap.main "$@"\n')
        script.chmod(0o755)
        self.environment = {**stasis.environment, "PATH": f"{directory}:{os.environ['PATH']}"}

    def __call__(self, *arguments: str | Path) -> Said:
        """Run a command line in this process."""
        before = signal.getsignal(signal.SIGINT)
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGINT, before)
        return Said(code, out.getvalue(), err.getvalue())

    def ok(self, *arguments: str | Path) -> str:
        """What a command printed that must succeed and say nothing else."""
        said = self(*arguments)
        assert (said.code, said.err) == (0, ""), said
        return said.out.rstrip("\n")

    def popen(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command as a script does."""
        return subprocess.Popen([str(self.directory / "blksnap"), *map(str, arguments)], env=self.environment,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def script(self, text: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """Run a shell script that finds `blksnap` on its path."""
        return subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=self.environment, cwd=self.directory,
                              text=True, capture_output=True, timeout=timeout)  # fmt: skip

    def replay(self, transcript: str, names: Mapping[str, str]) -> dict[str, str]:
        """Run each `$ COMMAND` and compare what follows it: standard output, and behind `! ` standard error.

        A command without `! ` must return 0, one with it 1. `$NAME` in a command stands for a value of `names`;
        `<uuid:NAME>` in the output is a UUID that gets that name.
        """
        known = dict(names)
        for block in re.split(r"^\$ ", transcript.lstrip("\n"), flags=re.MULTILINE)[1:]:
            command, _, expected = block.partition("\n")
            words = [re.sub(r"\$(\w+)", lambda found: known[found[1]], word) for word in command.split()]
            self._compare(command, self(*words), expected, known)
        return known

    def _compare(self, command: str, said: Said, expected: str, known: dict[str, str]) -> None:
        lines = expected.splitlines(keepends=True)
        out = "".join(line for line in lines if not line.startswith("! "))
        err = "".join(line[2:] for line in lines if line.startswith("! "))
        assert said.code == (1 if err else 0), (command, said)
        for wanted, got in ((out, said.out), (err, said.err)):
            match = re.fullmatch(_pattern(wanted, known), got)
            assert match, f"$ {command}\nprinted {got!r}\ninstead of {wanted!r}"
            known |= match.groupdict()


def _pattern(text: str, known: Mapping[str, str]) -> str:
    text = re.sub(r"\$(\w+)", lambda found: known.get(found[1], found[0]), text)
    pattern = re.escape(text)
    for place, expression in PLACES.items():
        pattern = pattern.replace(re.escape(place), expression)
    return re.sub(r"<uuid:(\w+)>", lambda found: f"(?P<{found[1]}>{PLACES['<uuid>']})", pattern)


@pytest.fixture
def blksnap(stasis: Stasis, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """The tool on directories of its own; everything it started ends with the test."""
    for name in ("STASIS_RUN_DIR", "STASIS_STATE_DIR"):
        monkeypatch.setenv(name, stasis.environment[name])
    directory = short_dir / "bin"
    directory.mkdir()
    return Tool(stasis, directory)
