# SPDX-License-Identifier: Apache-2.0
"""What all commands on a repository share: where it is, and what opens it. Secrets never stand on a command line."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from stasis.errors import UsageError

if TYPE_CHECKING:
    from stasis.backup.repo import Repository, Secrets

__all__ = ["add_latest", "add_repository", "open_repository", "repository_url", "secrets_of"]


def add_repository(parser: argparse.ArgumentParser) -> None:
    """--repo and --key-file."""
    parser.add_argument("--repo", metavar="URL",
                        help="the repository: a path, s3://, gs:// or az:// (STASIS_REPO)")
    add_key_file(parser)


def add_key_file(parser: argparse.ArgumentParser) -> None:
    """--key-file alone, for `init`, which names its repository without an option."""
    parser.add_argument("--key-file", metavar="FILE",
                        help="open it with the content of FILE instead of a passphrase (STASIS_PASSPHRASE, "
                             "STASIS_PASSPHRASE_FILE, STASIS_PASSPHRASE_COMMAND, or a prompt)")


def repository_url(arguments: argparse.Namespace) -> str:
    """The repository that is meant. Raises UsageError when none is."""
    url: str | None = arguments.repo or os.environ.get("STASIS_REPO")
    if not url:
        raise UsageError("no repository is named", hint="give --repo or set STASIS_REPO")
    return url


def secrets_of(arguments: argparse.Namespace) -> Secrets:
    """Where the secret comes from: --key-file, the environment, or a prompt if there is somebody to ask."""
    from stasis.backup.repo import Secrets

    return Secrets.from_environment(arguments.key_file, ask if sys.stdin.isatty() else None)


def ask(text: str) -> str:
    """Ask for a passphrase on the terminal, without showing it."""
    import getpass

    return getpass.getpass(text)


def add_latest(parser: argparse.ArgumentParser) -> None:
    """--host and --device, for what `latest` means."""
    parser.add_argument("--host", metavar="NAME", help="of which host latest is meant")
    parser.add_argument("--device", metavar="NAME", help="of which device latest is meant")


def open_repository(arguments: argparse.Namespace, *, read_only: bool = False) -> Repository:
    """The repository of --repo, opened. Raises UsageError, RepositoryError, PassphraseError, DamagedError."""
    from stasis.backup.repo import Repository

    return Repository.open(repository_url(arguments), secrets_of(arguments), read_only=read_only)
