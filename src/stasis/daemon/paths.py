# SPDX-License-Identifier: Apache-2.0
"""Where the daemon keeps its sockets and files; the only place that puts such a path together.

The layout is the table in docs/design/architecture.md.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from stasis.daemon import rundir
from stasis.errors import DaemonError, PermissionDeniedError

__all__ = ["Directories", "check_socket_path", "default_run_dir", "default_state_dir", "resolve"]

SUN_PATH_SIZE = 108
"""sizeof(sockaddr_un.sun_path), the terminating zero included (unix(7))."""


@dataclass(frozen=True)
class Directories:
    """A run directory (gone at boot) and a state directory (kept), both absolute and mode 0700."""

    run: Path
    state: Path

    @property
    def control_socket(self) -> Path:
        return self.run / "control.sock"

    @property
    def lock(self) -> Path:
        return self.run / "daemon.lock"

    @property
    def log(self) -> Path:
        return self.run / "daemon.log"

    @property
    def settings(self) -> Path:
        return self.state / "settings.json"

    @property
    def tracers(self) -> Path:
        """The registry of dattobd's tracers."""
        return self.state / "datto.json"

    @property
    def datto_info(self) -> Path:
        """What dattobd shows as /proc/datto-info."""
        return self.run / "datto-info"

    def nbd_socket(self, export: str) -> Path:
        return Path(rundir.nbd_socket(str(self.run), export))

    def worker_control(self, name: str) -> Path:
        return self.run / "workers" / f"{name}.ctl"

    def worker_inner(self, name: str) -> Path:
        return self.run / "workers" / f"{name}.inner"

    def log_of(self, export: str) -> Path:
        """Log of a worker (device name) or an image server (`NAME@UUID8`)."""
        return self.run / "workers" / f"{export}.log"

    def runtime_of(self, name: str) -> Path:
        """What a next daemon needs to adopt a worker."""
        return self.run / "workers" / f"{name}.json"

    @property
    def snapshots(self) -> Path:
        return self.run / "snapshots"

    @property
    def driven(self) -> Path:
        """Snapshots that kernel modules hold."""
        return self.run / "driven"

    def snapshot(self, uuid: str) -> Path:
        return self.snapshots / uuid

    @property
    def devices(self) -> Path:
        return self.state / "devices"

    def device(self, name: str) -> Path:
        return self.devices / name

    def create(self) -> None:
        """Make the directories, readable by nobody else. Raises PermissionDeniedError or DaemonError."""
        for directory in (self.run, self.state):
            _make_private(directory)
        for directory in (self.run / "nbd", self.run / "workers", self.snapshots, self.devices):
            directory.mkdir(mode=0o700, exist_ok=True)

    def check_export(self, export: str) -> None:
        """Raise DaemonError if a socket of the device or image `export` would have too long a path."""
        check_socket_path(self.nbd_socket(f"{export}@01234567" if "@" not in export else export))
        check_socket_path(self.worker_inner(export))


def check_socket_path(path: Path) -> None:
    """Raise DaemonError (ENAMETOOLONG) if no unix socket can have this path."""
    if len(os.fsencode(path)) >= SUN_PATH_SIZE:
        raise DaemonError(f"the socket path {path} is longer than {SUN_PATH_SIZE - 1} bytes",
                          hint="choose a shorter --run-dir, or a shorter --name for the device",
                          errno=errno.ENAMETOOLONG)


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info, link = directory.stat(), directory.lstat()
    except PermissionError as error:
        raise PermissionDeniedError(f"{directory} cannot be made: {error.strerror}",
                                    hint="choose other directories with --run-dir and --state-dir") from error
    except OSError as error:
        raise DaemonError(f"{directory} cannot be made: {error.strerror}", errno=error.errno or 0,
                          hint="choose other directories with --run-dir and --state-dir") from error
    if {info.st_uid, link.st_uid} != {os.geteuid()}:  # nor may another user's link lead us to our own files
        raise PermissionDeniedError(f"{directory} belongs to another user",
                                    hint="choose other directories with --run-dir and --state-dir")
    if stat.S_IMODE(info.st_mode) & 0o077:
        directory.chmod(0o700)


def default_run_dir() -> Path:
    """/run/stasis for root; else below XDG_RUNTIME_DIR, or in /tmp where a login session gave none."""
    return Path(rundir.default())


def default_state_dir() -> Path:
    """/var/lib/stasis for root; else below XDG_STATE_HOME, whose default is ~/.local/state."""
    if os.geteuid() == 0:
        return Path("/var/lib/stasis")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "stasis"


def resolve(run_dir: str | os.PathLike[str] | None = None,
            state_dir: str | os.PathLike[str] | None = None) -> Directories:
    """The directories to use: the arguments, then STASIS_RUN_DIR and STASIS_STATE_DIR, then the defaults."""
    state = state_dir or os.environ.get("STASIS_STATE_DIR") or default_state_dir()
    return Directories(Path(rundir.resolve(run_dir)), Path(os.path.abspath(state)))
