# SPDX-License-Identifier: Apache-2.0
"""`stasis backup mount` and `umount`: a backup as a directory."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.backup.options import open_repository
from stasis.cli.backup.reading import add_reading, wanted
from stasis.cli.options import add_command

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the commands."""
    command = add_command(group, "mount", mount, "Mount the file system in a backup, read-only.", """
stasis backup mount latest /mnt --device disk.img
stasis backup mount 1f3a /mnt --partition 2
""")
    command.add_argument("id", metavar="ID", help="the backup: an id, the start of one, or latest")
    command.add_argument("directory", metavar="DIR", help="an empty directory")
    command.add_argument("--partition", metavar="N", type=int, help="mount this partition of the disk")
    command.add_argument("--overlay", metavar="DIR",
                         help="where scratch space for the file system's journal is made, as a file without a name "
                              "(TMPDIR, or /var/tmp)")
    add_reading(command)
    command = add_command(group, "umount", umount, "Unmount a backup.", "stasis backup umount /mnt")
    command.add_argument("directory", metavar="DIR", help="where it is mounted")


def mount(arguments: argparse.Namespace) -> None:
    """stasis backup mount"""
    from stasis.backup.mount import command
    from stasis.backup.serve.overlay import default_directory

    choice = wanted(arguments, [arguments.id], overlay=os.path.abspath(arguments.overlay or default_directory()))
    mounted = command.mount(arguments.directory, choice, functools.partial(open_repository, arguments, read_only=True),
                            run_dir=_run_dir(arguments, create=True), partition=arguments.partition)
    if not mounted.replayed:
        print(f"stasis: the journal could not be replayed ({mounted.options}): what was written last may be missing",
              file=sys.stderr)
    if arguments.json:
        output.print_json(mounted)
    else:
        print(f"{mounted.directory}: {mounted.device} of {mounted.time}, {mounted.type}, {mounted.options}")


def umount(arguments: argparse.Namespace) -> None:
    """stasis backup umount"""
    from stasis.backup.mount import command

    command.umount(arguments.directory, run_dir=_run_dir(arguments, create=False))
    if arguments.json:
        output.print_json({"directory": os.path.realpath(arguments.directory)})


def _run_dir(arguments: argparse.Namespace, *, create: bool) -> Path:
    from stasis.daemon.paths import resolve

    directories = resolve(getattr(arguments, "run_dir", None), getattr(arguments, "state_dir", None))
    if create:
        directories.create()
    return directories.run
