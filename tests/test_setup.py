# SPDX-License-Identifier: Apache-2.0
"""The first command of a newcomer either works or says in one sentence what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "tools" / "setup-env"
SETUP_S3 = ROOT / "tools" / "setup-s3"


def _bare_path(directory: Path) -> str:
    """A PATH with what the script itself uses and nothing that could install packages."""
    for name in ("sh", "env", "id", "mktemp", "rm", "cat", "touch", "dirname"):
        (directory / name).symlink_to(str(shutil.which(name)))
    return str(directory)


def _set_up(venv: Path, python: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "PYTHON": python, "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [str(shutil.which("sh")), str(SETUP), str(venv)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    directory = tmp_path / "bin"
    directory.mkdir()
    return _bare_path(directory)


def test_a_missing_python_is_named(tmp_path: Path, bare_path: str) -> None:
    result = _set_up(tmp_path / "venv", "python3", bare_path)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "setup-env: no python3 on PATH. As root, run: apt-get install python3 python3-venv"
    ]


def test_an_old_python_is_refused(tmp_path: Path, bare_path: str) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    result = _set_up(tmp_path / "venv", str(old), bare_path)
    assert result.returncode == 1
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.9.2" in result.stderr


def test_a_python_without_venv_is_told_apart(tmp_path: Path, bare_path: str) -> None:
    bare = tmp_path / "python-bare"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    bare.chmod(0o755)
    result = _set_up(tmp_path / "venv", str(bare), bare_path)
    assert result.returncode == 1
    assert "apt-get install python3-venv" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_npm_costs_only_the_tests_that_need_it(tmp_path: Path, bare_path: str) -> None:
    target = tmp_path / "s3server"
    result = subprocess.run([str(shutil.which("sh")), str(SETUP_S3), str(target)], env={"PATH": bare_path},
                            capture_output=True, text=True)
    assert result.returncode == 0
    assert "no npm on PATH" in result.stderr
    assert not target.exists()


@pytest.mark.tool("make")
def test_help_describes_every_target() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    phony = makefile.partition(".PHONY:")[2].partition("\n")[0].split()
    assert {line.split()[1] for line in listed.splitlines()} == set(phony) - {"print-packages"}


@pytest.mark.tool("bash")
def test_the_scripts_are_valid_shell() -> None:
    for script, shell in ((SETUP, "sh"), (SETUP_S3, "sh"), (ROOT / ".ci" / "run", "bash")):
        assert os.access(script, os.X_OK)
        result = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_package_installs_its_type_information() -> None:
    import stasis

    assert (Path(stasis.__file__).parent / "py.typed").exists()
    assert sys.version_info >= (3, 11)
