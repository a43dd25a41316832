# SPDX-License-Identifier: Apache-2.0
"""The programs that backups are measured against, restic and borg, as their users run them with their defaults."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path

from lab import Lab
from ours import Stasis

__all__ = ["Archiver", "Borg", "Restic", "StasisArchiver"]

PASSPHRASE = "correct horse battery staple"


class Archiver(ABC):
    """A repository in the lab, and the jobs that are measured on it."""

    name = ""

    def __init__(self, lab: Lab, number: int) -> None:
        self._lab = lab
        self.repository = lab.directory / f"{self.name}-{number}"
        self._home = lab.directory / f"{self.name}-home"
        for directory in (self.repository, self._home):
            lab.on_exit(partial(shutil.rmtree, directory, ignore_errors=True))
        self._init()

    def _run(self, *words: str | Path, directory: Path | None = None) -> str:
        settings = {**self._environment(), "HOME": str(self._home), "XDG_CACHE_HOME": str(self._home / "cache")}
        assigned = [f"{name}={value}" for name, value in settings.items()]
        return self._lab.run(["env", *assigned, *words], directory=directory)

    @abstractmethod
    def _environment(self) -> dict[str, str]:
        """What the program takes from the environment: repository and passphrase."""

    @abstractmethod
    def _init(self) -> None:
        """Make the repository."""

    @abstractmethod
    def create(self, image: Path) -> None:
        """Back up an image file."""

    @abstractmethod
    def restore(self, image: Path, target: Path) -> None:
        """Bring the last backup of an image back, into a directory that is empty."""

    @abstractmethod
    def verify(self) -> None:
        """Read and check all data."""


class Restic(Archiver):
    """restic with its defaults: encrypted, compressed."""

    name = "restic"

    def _environment(self) -> dict[str, str]:
        return {"RESTIC_REPOSITORY": str(self.repository), "RESTIC_PASSWORD": PASSPHRASE}

    def _init(self) -> None:
        self._run("restic", "init")

    def create(self, image: Path) -> None:
        self._run("restic", "backup", image)

    def restore(self, image: Path, target: Path) -> None:
        self._run("restic", "restore", "latest", "--target", target)

    def verify(self) -> None:
        self._run("restic", "check", "--read-data")


class Borg(Archiver):
    """borg with its defaults and a key in the repository: encrypted, lz4."""

    name = "borg"
    count = 0

    def _environment(self) -> dict[str, str]:
        return {"BORG_REPO": str(self.repository), "BORG_PASSPHRASE": PASSPHRASE}

    def _init(self) -> None:
        self._run("borg", "init", "--encryption=repokey")

    def create(self, image: Path) -> None:
        self.count += 1
        self._run("borg", "create", f"::{self.count}", image)

    def restore(self, image: Path, target: Path) -> None:
        self._run("borg", "extract", "--sparse", f"::{self.count}", directory=target)

    def verify(self) -> None:
        self._run("borg", "check", "--verify-data")


class StasisArchiver(Archiver):
    """stasis with its defaults; `plain` leaves encryption and compression out."""

    name = "stasis"

    def __init__(self, lab: Lab, number: int, stasis: Stasis, *, plain: bool = False) -> None:
        self._stasis = stasis
        self._plain = plain
        super().__init__(lab, number)

    def _environment(self) -> dict[str, str]:
        secret = {} if self._plain else {"STASIS_PASSPHRASE": PASSPHRASE}
        return {"STASIS_REPO": str(self.repository), **secret}

    def command(self, *words: str | Path) -> list[str]:
        """The words of a command on this repository, for whoever runs it otherwise."""
        assigned = [f"{name}={value}" for name, value in self._environment().items()]
        return ["env", *assigned, *self._stasis.command(*words)]

    def _init(self) -> None:
        options = ("--no-encryption", "--compression", "none") if self._plain else ()
        self._run(*self._stasis.command("repo", "init", self.repository, *options))

    def create(self, image: Path | str) -> None:
        self._run(*self._stasis.command("backup", "create", image))

    def restore(self, image: Path, target: Path) -> None:
        self._run(*self._stasis.command("backup", "restore", "latest", target / image.name))

    def verify(self) -> None:
        self._run(*self._stasis.command("backup", "check", "--read-data"))
