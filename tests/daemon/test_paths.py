# SPDX-License-Identifier: Apache-2.0
"""Where files lie: arguments before variables before defaults, private, and short enough for sockets."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from stasis.daemon import paths
from stasis.errors import DaemonError, ExitCode, PermissionDeniedError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STASIS_RUN_DIR", "STASIS_STATE_DIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_arguments_go_before_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STASIS_RUN_DIR", "/variable/run")
    monkeypatch.setenv("STASIS_STATE_DIR", "/variable/state")
    assert paths.resolve() == paths.Directories(Path("/variable/run"), Path("/variable/state"))
    assert paths.resolve("/given/run", "/given/state") == paths.Directories(Path("/given/run"), Path("/given/state"))


def test_directories_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.resolve("run", "state") == paths.Directories(tmp_path / "run", tmp_path / "state")


def test_defaults_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    assert paths.resolve() == paths.Directories(Path("/run/stasis"), Path("/var/lib/stasis"))


def test_defaults_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/user")
    assert paths.resolve() == paths.Directories(Path("/tmp/stasis-1000"), Path("/home/user/.local/state/stasis"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/user/state")
    assert paths.resolve() == paths.Directories(Path("/run/user/1000/stasis"), Path("/home/user/state/stasis"))


def test_nobody_else_can_look_into_the_directories(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    directories = paths.Directories(tmp_path / "run", tmp_path / "state")
    directories.create()
    directories.create()
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len(made) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}


def test_a_socket_path_has_at_most_107_bytes() -> None:
    paths.check_socket_path(Path("/" + "x" * 106))
    with pytest.raises(DaemonError) as raised:
        paths.check_socket_path(Path("/" + "x" * 107))
    assert (raised.value.errno, raised.value.exit_code) == (errno.ENAMETOOLONG, ExitCode.DAEMON)
    with pytest.raises(DaemonError):
        paths.check_socket_path(Path("/" + "é" * 54))


def test_a_device_name_leaves_room_for_its_images() -> None:
    directories = paths.Directories(Path("/" + "r" * 59), Path("/s"))
    directories.check_export("n" * 28)
    with pytest.raises(DaemonError):
        directories.check_export("n" * 29)


@pytest.mark.root
def test_a_directory_or_link_of_another_user_is_not_used(tmp_path: Path) -> None:
    ours, link, theirs = tmp_path / "ours", tmp_path / "link", tmp_path / "theirs"
    ours.mkdir(mode=0o755)
    theirs.mkdir()
    link.symlink_to(ours)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    os.chown(theirs, 65534, 65534)
    for directory in (link, theirs):
        with pytest.raises(PermissionDeniedError):
            paths.Directories(directory, tmp_path / "state").create()
    assert stat.S_IMODE(ours.stat().st_mode) == 0o755
