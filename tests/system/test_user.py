# SPDX-License-Identifier: Apache-2.0
"""An ordinary user does everything on image files of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import ExitCode
from tests.runner import Stasis
from tests.system.helpers import MIB, tool

NOBODY = 65534

pytestmark = [pytest.mark.root, pytest.mark.tool("setpriv", "nbdcopy")]


@pytest.fixture
def home() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def user(home: Path) -> Iterator[Stasis]:
    """The command line of a user without privileges, with the default directories below their home."""
    stasis = Stasis(home / "run" / "stasis", home / "state" / "stasis")
    drop = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", "--"]
    for name in ("STASIS_RUN_DIR", "STASIS_STATE_DIR"):
        del stasis.environment[name]
    stasis.environment |= {"XDG_RUNTIME_DIR": f"{home}/run", "XDG_STATE_HOME": f"{home}/state", "HOME": str(home),
                           "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    paths = [str(Path(__file__).parents[2] / "src"), sysconfig.get_path("purelib")]
    stasis.environment["PYTHONPATH"] = os.pathsep.join(paths)
    stasis.command = [*drop, _interpreter(drop, stasis.environment), "-m", "stasis"]
    yield stasis
    stasis.stop()


def _interpreter(drop: list[str], environment: dict[str, str]) -> str:
    """A Python that the user can start, and start again from itself: ours may lie in root's home."""
    probe = "import stasis, subprocess, sys, varlink; subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys.executable, "/usr/bin/python3"):
        if subprocess.run([*drop, python, "-c", probe], env=environment, capture_output=True).returncode == 0:
            return python
    pytest.skip("neither our Python nor that of the system can be used by other users")


def _file(path: Path, data: bytes, owner: int = NOBODY) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    os.chown(path, owner, owner)
    return path


def test_the_whole_flow(user: Stasis, home: Path) -> None:
    first, second = os.urandom(2 * MIB), os.urandom(2 * MIB)
    disk, other = _file(home / "disk.img", first), _file(home / "other.img", second)
    uri = user("device", "attach", disk, "--name", "disk")
    (home / "storage").mkdir()
    os.chown(home / "storage", NOBODY, NOBODY)
    uuid = user("snapshot", "create", "--storage", home / "storage", "--limit", "64M", "disk", "--take")
    tool("nbdcopy", other, uri)
    user("snapshot", "copy", uuid, "disk", home / "copy.img", "--verify")
    assert (home / "copy.img").read_bytes() == first
    user("snapshot", "destroy", uuid)
    uuid = user("snapshot", "create", "--storage", "memory", "--limit", "64M", "disk", "--take")
    user("snapshot", "copy", uuid, "disk", home / "copy.img", "--since", "1")
    assert (home / "copy.img").read_bytes() == second
    assert (home / "copy.img").stat().st_uid == NOBODY
    user("snapshot", "destroy", uuid)
    user("device", "detach", "disk")
    assert disk.read_bytes() == second


def test_what_only_root_can_do_is_refused(user: Stasis, home: Path) -> None:
    secret = _file(home / "secret.img", bytes(MIB), owner=0)
    assert "permission" in user.fail(ExitCode.PERMISSION, "device", "attach", secret)
    disk = _file(home / "disk.img", bytes(MIB))
    assert "root" in user.fail(ExitCode.PERMISSION, "device", "attach", disk, "--kernel")
    assert user.json("device", "list") == []
    user.fail(ExitCode.PERMISSION, "device", "list", "--run-dir", "/run/stasis-of-nobody")


def test_directories_and_sockets_are_closed_to_others(user: Stasis, home: Path) -> None:
    user("device", "attach", _file(home / "disk.img", bytes(MIB)))
    for path in (user.run_dir, user.state_dir):
        assert path.stat().st_mode & 0o077 == 0
    for path in user.run_dir.rglob("*"):
        if path.is_socket():
            assert path.stat().st_mode & 0o077 == 0
