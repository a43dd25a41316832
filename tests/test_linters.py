# SPDX-License-Identifier: Apache-2.0
"""Style and types are tests, so that one command checks all."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _run(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def _python_files() -> list[Path]:
    """What git knows, or in a copy without git what lies in our folders."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "*.py"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / line for line in listed.splitlines() if (ROOT / line).exists()]
    return [path for folder in ("src", "tests", "tools", "bench") for path in (ROOT / folder).rglob("*.py")]


def test_ruff_finds_nothing() -> None:
    _run("ruff", "check", ".")


def test_mypy_strict_finds_nothing() -> None:
    _run("mypy")


def test_every_file_starts_with_its_licence() -> None:
    heads = {path: path.read_text().splitlines()[:3] for path in _python_files()}
    missing = [path for path, head in heads.items() if head and "SPDX-License-Identifier" not in str(head)]
    assert not missing


def test_no_file_is_two_rooms() -> None:
    """About 400 lines is where a file should become two; tests, which are lists, get a little more."""
    sizes = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in _python_files()}
    limits = {path: 500 if path.parts[0] == "tests" else 400 for path in sizes}
    assert {str(path): size for path, size in sizes.items() if size > limits[path]} == {}
