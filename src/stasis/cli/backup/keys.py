# SPDX-License-Identifier: Apache-2.0
"""`key add`, `remove` and `list`, in `stasis repo` and in `stasis backup`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.backup.options import add_repository, ask, open_repository
from stasis.cli.options import Parser, add_command
from stasis.errors import UsageError

if TYPE_CHECKING:
    from stasis.backup.repo import Secrets
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the commands."""
    description = "Who may open a repository: add, list and remove keys."
    parser = group.add_parser("key", help=description, description=description)
    keys = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    _add_add(keys)
    add_repository(add_command(keys, "list", list_keys, "List the keys that open a repository.",
                               "stasis repo key list --repo /srv/backup"))
    parser = add_command(keys, "remove", remove, "Remove a key; the last one stays.",
                         "stasis repo key remove 6f1c2a7e --repo /srv/backup")
    parser.add_argument("id", metavar="ID", help="the key, or the start of its id")
    add_repository(parser)


def _add_add(keys: Groups) -> None:
    parser = add_command(keys, "add", add_key, "Let another passphrase or key file open a repository.", """
stasis repo key add --repo /srv/backup --new-key-file /root/backup.key
stasis repo key add --repo /srv/backup --new-passphrase-file /root/second --label office""")
    parser.add_argument("--label", default="", help="a note that key list shows; it is stored readable for all")
    new = parser.add_mutually_exclusive_group()
    new.add_argument("--new-key-file", metavar="FILE", help="add the content of FILE as a key")
    new.add_argument("--new-passphrase-file", metavar="FILE",
                     help="add the first line of FILE as a passphrase (default: ask for it)")
    add_repository(parser)


def add_key(arguments: argparse.Namespace) -> None:
    with open_repository(arguments) as repository:
        slot = repository.add_key(_new_secrets(arguments).get_new(repository.url), arguments.label)
    if arguments.json:
        output.print_json(slot)
    else:
        print(f"added the {slot.kind.replace('-', ' ')} {slot.id}")


def _new_secrets(arguments: argparse.Namespace) -> Secrets:
    """Where the new secret comes from; the environment holds the one that opens the repository today."""
    from stasis.backup.repo import Secrets

    if arguments.new_passphrase_file is not None:
        return Secrets.from_environment(environment={"STASIS_PASSPHRASE_FILE": arguments.new_passphrase_file})
    if arguments.new_key_file is None and not sys.stdin.isatty():
        raise UsageError("no new key is named and there is no terminal to ask for a passphrase",
                         hint="give --new-key-file or --new-passphrase-file")
    return Secrets.from_environment(arguments.new_key_file, ask, environment={})


def list_keys(arguments: argparse.Namespace) -> None:
    with open_repository(arguments, read_only=True) as repository:
        slots = repository.key_slots()
    if arguments.json:
        output.print_json(slots)
    else:
        output.print_table(("ID", "KIND", "CREATED", "HOST", "LABEL"),
                           [(slot.id, slot.kind, slot.created, slot.host, slot.label) for slot in slots])


def remove(arguments: argparse.Namespace) -> None:
    with open_repository(arguments) as repository:
        slot = repository.remove_key(arguments.id)
    if arguments.json:
        output.print_json(slot)
    else:
        print(f"removed the {slot.kind.replace('-', ' ')} {slot.id}")
