# SPDX-License-Identifier: Apache-2.0
"""`stasis backup export` and `import`: backups as qcow2 files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.cli.backup.options import add_latest, add_repository, open_repository
from stasis.cli.backup.reporting import report
from stasis.cli.backup.selecting import tag_list
from stasis.cli.options import add_command
from stasis.errors import UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.progress import Progress
    from stasis.backup.repo import Repository
    from stasis.backup.streams.qcow_export import ExportedFile
    from stasis.cli.options import Groups

__all__ = ["add"]

FORMATS = ("qcow2", "raw", "vdi", "vhdx", "vmdk", "vpc")


def add(group: Groups) -> None:
    """Add the commands."""
    command = add_command(group, "export", export, "Write backups as qcow2 files, whole or as a chain of increments.",
                          """
stasis backup export latest disk.qcow2
stasis backup export latest images --chain
""")
    command.add_argument("ids", metavar="ID", nargs="+",
                         help="the backup; with --chain it may be several, oldest first")
    add_latest(command)
    command.add_argument("target", metavar="TARGET", type=Path,
                         help="the file to write; with --chain the directory of a file per backup")
    command.add_argument("--chain", action="store_true",
                         help="a file per backup, each with what changed since the one below; one backup stands for "
                              "itself and all that it was made against")
    add_repository(command)
    command = add_command(group, "import", import_, "Back up a qcow2 file, or each file of a chain.", """
stasis backup import disk.qcow2 --name disk
stasis backup import images/tuesday.qcow2 --name disk --chain
""")
    command.add_argument("file", metavar="FILE", type=Path, help="the image")
    command.add_argument("--name", metavar="DEVICE", required=True, help="name of the device in the repository")
    command.add_argument("--chain", action="store_true",
                         help="back up each of the files that FILE builds on as well, lowest first")
    command.add_argument("--format", choices=FORMATS, default="qcow2", help="format of the image (qcow2)")
    command.add_argument("--host", metavar="NAME", default="", help="whose backup it is (this host's name)")
    command.add_argument("--tag", metavar="TAG[,TAG]", type=tag_list, action="extend", default=[],
                         help="tags; may be given several times")
    add_repository(command)


def export(arguments: argparse.Namespace) -> None:
    """stasis backup export"""
    if len(arguments.ids) > 1 and not arguments.chain:
        raise UsageError(f"{arguments.target} can hold one backup only", hint="give --chain to make a file of each")
    with report(arguments) as reporter:
        with open_repository(arguments, read_only=True) as repository:
            files = _export(repository, arguments, reporter.progress)
        text = "\n".join(_line(file) for file in files)
        reporter.finish({"files": [file.as_dict() for file in files]}, text)


def _export(repository: Repository, arguments: argparse.Namespace, progress: Progress) -> list[ExportedFile]:
    from stasis.backup.streams.qcow_export import ancestry, export_chain, export_whole

    backups = [repository.resolve(text, host=arguments.host, device=arguments.device) for text in arguments.ids]
    if not arguments.chain:
        return [export_whole(repository, backups[0], arguments.target, progress)]
    if len(backups) == 1:
        backups = ancestry(repository, backups[0])
    return export_chain(repository, backups, arguments.target, progress)


def _line(file: ExportedFile) -> str:
    if file.known:
        return f"{file.path}: was there"
    on = f", on {file.backing}" if file.backing else ""
    return f"{file.path}: {format_size(file.bytes_data)} of {format_size(file.size)}{on}"


def import_(arguments: argparse.Namespace) -> None:
    """stasis backup import"""
    with report(arguments) as reporter:
        with open_repository(arguments) as repository:
            from stasis.backup.streams.qcow_import import ImportOptions, backing_chain, import_images

            chain = backing_chain(arguments.file, arguments.format, follow=arguments.chain)
            options = ImportOptions(arguments.name, arguments.format, arguments.host, tuple(arguments.tag))
            backups = import_images(repository, chain, options, reporter.progress)
        text = "\n".join(f"{one.id}  {one.kind} backup of {one.path}: {format_size(one.bytes_data)} read, "
                         f"{format_size(one.bytes_stored)} stored" for one in backups)
        reporter.finish({"backups": [one.as_dict() for one in backups]}, text)
