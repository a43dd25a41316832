# SPDX-License-Identifier: Apache-2.0
"""`stasis repo init`: make a repository."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.backup.options import add_key_file, secrets_of
from stasis.cli.options import add_command, size
from stasis.errors import UsageError

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the command."""
    parser = add_command(group, "init", init, "Make a repository.", """
stasis repo init /srv/backup
stasis repo init s3://bucket/backup --chunk-size 4M
stasis repo init /srv/backup --key-file /etc/stasis/backup.key""")
    parser.add_argument("url", metavar="URL", help="where: an empty or new folder, or s3://, gs:// or az://")
    parser.add_argument("--chunk-size", metavar="SIZE", type=size, default=1 << 20,
                        help="bytes that are stored, compared and shared as one: a power of two from 64K to 16M "
                             "(default 1M)")
    parser.add_argument("--compression", choices=("zstd", "none"), default="zstd",
                        help="compression of what is stored (default zstd)")
    parser.add_argument("--no-encryption", action="store_true",
                        help="store everything readable for whoever can read the place")
    add_key_file(parser)


def init(arguments: argparse.Namespace) -> None:
    from stasis.backup.repo import Repository

    secrets = secrets_of(arguments)
    if arguments.no_encryption and secrets.given:
        raise UsageError("--no-encryption, but a passphrase or key file is given",
                         hint="leave out one of the two; unset STASIS_PASSPHRASE and its kin")
    secret = None if arguments.no_encryption else secrets.get_new(arguments.url)
    with Repository.init(arguments.url, secret=secret, chunk_size=arguments.chunk_size,
                         compression=arguments.compression) as repository:
        if arguments.json:
            output.print_json({"id": repository.id, "url": repository.url, "chunk_size": repository.chunk_size,
                               "compression": repository.compression, "encrypted": repository.encrypted})
            return
        print(f"made the repository {repository.id} in {repository.url}")
        if repository.encrypted:
            print("Keep the passphrase or key file where the backups are not: without it nothing can be restored.")
