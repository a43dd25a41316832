# SPDX-License-Identifier: Apache-2.0
"""`stasis backup send` and `receive`: a backup as a stream on standard output and input."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.cli.backup import qcow
from stasis.cli.backup.options import add_latest, add_repository, open_repository
from stasis.cli.backup.reporting import Reporter, report
from stasis.cli.options import add_command
from stasis.errors import StasisError, UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.backup.streams.rbddiff import StreamReader
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the commands."""
    command = add_command(group, "send", send, "Write a backup to standard output, for `stasis backup receive`.", """
stasis backup send latest --device disk | ssh host stasis backup receive --repo /srv/backups
stasis backup send 9f2c --from 41d7 > monday-to-tuesday.stream
""")
    command.add_argument("id", metavar="ID", help="the backup: its id, the beginning of it, or latest")
    add_latest(command)
    command.add_argument("--from", dest="base", metavar="ID",
                         help="send only what differs from this earlier backup, which the receiver must have")
    add_repository(command)
    command = add_command(group, "receive", receive, "Store a backup that comes on standard input.", """
stasis backup receive --repo /srv/backups < monday.stream
stasis backup receive --output disk.img < monday.stream
""")
    command.add_argument("--output", metavar="FILE", type=Path,
                         help="write the image to a new file; no repository is needed")
    add_repository(command)
    qcow.add(group)


def send(arguments: argparse.Namespace) -> None:
    """stasis backup send"""
    if os.isatty(1):
        raise UsageError("a backup stream is nothing for a terminal", hint="write it to a file or to a pipe, as in "
                         "`stasis backup send ID > FILE`")
    with report(arguments, lines=sys.stderr) as reporter, open_repository(arguments, read_only=True) as repository:
        from stasis.backup.streams.newfile import failure
        from stasis.backup.streams.send import send as send_backup

        of = {"host": arguments.host, "device": arguments.device}
        backup = repository.resolve(arguments.id, **of)
        base = None if arguments.base is None else repository.resolve(arguments.base, **of)
        try:
            with open(1, "wb", closefd=False) as sink:
                result = send_backup(repository, backup, base, sink, reporter.progress)
        except BrokenPipeError as error:
            raise StasisError("whoever read the stream ended before it was complete",
                              hint="see what the receiver says", errno=error.errno or 0) from error
        except OSError as error:
            raise failure(f"the stream cannot be written: {error.strerror}", error) from error
        reporter.finish(result.as_dict())


def receive(arguments: argparse.Namespace) -> None:
    """stasis backup receive"""
    if os.isatty(0):
        raise UsageError("a backup stream does not come from a terminal",
                         hint="read it from a file or a pipe, as in `stasis backup receive < FILE`")
    with report(arguments) as reporter:
        if arguments.output is not None:
            _to_file(_open_stream(), arguments.output, reporter)
        else:
            _to_repository(arguments, reporter)


def _open_stream() -> StreamReader:
    from stasis.backup.streams.receive import open_stream

    return open_stream(open(0, "rb", closefd=False))


def _to_file(stream: StreamReader, path: Path, reporter: Reporter) -> None:
    from stasis.backup.streams.image import receive_image

    result = receive_image(stream, path, reporter.progress)
    reporter.finish(result.as_dict(), f"wrote {format_size(result.size)} to {path}")


def _to_repository(arguments: argparse.Namespace, reporter: Reporter) -> None:
    with open_repository(arguments) as repository:
        from stasis.backup.streams.receive import receive as receive_backup

        result = receive_backup(repository, _open_stream(), reporter.progress)
    if result.known:
        reporter.finish(result.as_dict(), f"{result.id}\nit was here already; the stream is sound")
        return
    reporter.finish(result.as_dict(), f"{result.id}\n{result.kind} backup of {result.device} on {result.host}: "
                    f"{format_size(result.bytes_data)} received, {format_size(result.bytes_stored)} stored")
