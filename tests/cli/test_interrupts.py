# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a command starts up: status 130 and one line, whatever module is being imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stasis.errors import ExitCode

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
SCRIPTS: dict[str, str] = PROJECT["scripts"]

INTERRUPTED = """
import importlib, os, sys
module, entry, function, left = sys.argv[1:5]
sys.argv[1:5], left = [], int(left)

def hook(frame, event, arg):
    global left
    if event == "call" and frame.f_code.co_name == function:
        left -= 1
        if left == 0:
            sys.setprofile(None)
            os.kill(os.getpid(), 2)

call = getattr(importlib.import_module(module), entry)
sys.setprofile(hook)
status = call()
assert left <= 0, "it was not interrupted"
sys.exit(status)
"""


def interrupt(script: str, function: str, count: int, *arguments: str) -> tuple[int, str, str]:
    """Status and output of a console script that gets SIGINT at a call of a function."""
    module, _, entry = SCRIPTS[script].partition(":")
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, module, entry, function, str(count), *arguments],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_is_interrupted_at_its_first_import_says_so(script: str) -> None:
    assert interrupt(script, "_find_and_load", 1) == (ExitCode.INTERRUPTED, "", f"{script}: interrupted\n")


@pytest.mark.parametrize(("function", "count"), [
    ("_find_and_load", 3), ("_find_and_load", 40), ("add_parser", 1),
    ("__set_name__", 1),  # what is raised there is not what comes out, up to Python 3.11
])
def test_a_command_that_is_interrupted_as_it_starts_up_says_so(function: str, count: int, tmp_path: Path) -> None:
    said = interrupt("stasis", function, count, "track", "list", "--state-dir", str(tmp_path))
    assert said == (ExitCode.INTERRUPTED, "", "stasis: interrupted\n")


def test_another_error_of_a_command_is_not_taken_for_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    from stasis.cli import main, start

    def fail() -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr(main, "main", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        start.stasis()
