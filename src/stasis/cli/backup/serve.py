# SPDX-License-Identifier: Apache-2.0
"""`stasis backup serve` and `diff`: read backups in place."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stasis.cli import output
from stasis.cli.backup import mount
from stasis.cli.backup.options import add_latest, add_repository, open_repository
from stasis.cli.backup.reading import add_reading, wanted
from stasis.cli.options import add_command, add_tls, size
from stasis.errors import StasisError, UsageError

if TYPE_CHECKING:
    from stasis.backup.serve.diff import Difference
    from stasis.backup.serve.foreground import Listener
    from stasis.backup.serve.opening import ServedBackups
    from stasis.cli.options import Groups
    from stasis.linux.eventloop import EventLoop

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the commands."""
    _add_serve(group)
    mount.add(group)
    _add_diff(group)


def _add_serve(group: Groups) -> None:
    command = add_command(group, "serve", serve, "Serve backups over NBD in the foreground; prints their NBD URIs.", """
stasis backup serve latest --device disk.img --socket /run/disk.sock
stasis backup serve 1f3a 77b0 --overlay --tcp 127.0.0.1:10809
nbdinfo [ stasis backup serve 1f3a --repo /srv/backup ]
""")
    command.add_argument("ids", metavar="ID", nargs="+", help="the backups: ids, starts of ids, or latest")
    command.add_argument("--socket", metavar="PATH",
                         help="unix socket to listen on (one in the run directory, unless there is --tcp or sockets "
                              "were passed in by LISTEN_FDS)")
    add_tls(command, "listen on this TCP address")
    command.add_argument("--overlay", metavar="DIR", nargs="?", const="",
                         help="let clients write, into a file without a name in DIR (TMPDIR, or /var/tmp) that is gone "
                              "in the end")
    command.add_argument("--against", metavar="ID", action="append", default=[],
                         help="offer a dirty bitmap of what differs from this backup; once per device")
    add_reading(command)


def _add_diff(group: Groups) -> None:
    command = add_command(group, "diff", diff, "Print what differs between two backups, as extents in bytes.", """
stasis backup diff 1f3a 77b0
stasis backup diff 1f3a latest --device disk.img --json
stasis backup diff 1f3a 77b0 --offset 10G --limit 1000 --json
""")
    command.add_argument("base", metavar="A", help="the backup to compare with")
    command.add_argument("target", metavar="B", help="the backup whose differing extents are printed")
    command.add_argument("--offset", metavar="N", type=size, default=0, help="begin at this byte of B")
    command.add_argument("--limit", metavar="N", type=int, help="print at most so many extents")
    command.add_argument("--exact", action="store_true",
                         help="compare what chunks contain, 4 KiB at a time (without: whole chunks are told)")
    add_latest(command)
    add_repository(command)


def serve(arguments: argparse.Namespace) -> None:
    """stasis backup serve"""
    from stasis.backup.serve import foreground
    from stasis.backup.serve.opening import open_backups
    from stasis.linux import activation

    logging.basicConfig(format="stasis: %(message)s")
    if arguments.socket and arguments.tcp:
        raise UsageError("--socket and --tcp are both given", hint="give one of them")
    with contextlib.ExitStack() as stack:
        passed = _passed()
        for listener in passed:
            stack.callback(listener.socket.close)
        repository = stack.enter_context(open_repository(arguments, read_only=True))
        overlay = arguments.overlay if arguments.overlay is None else _directory(arguments.overlay)
        choice = wanted(arguments, arguments.ids, against=arguments.against, overlay=overlay)
        backups = stack.enter_context(open_backups(repository, choice))
        made, address = [], None
        if not passed or arguments.socket or arguments.tcp:
            listener, address = _listen(arguments, backups, stack)
            made = [listener]

        def ready(_loop: EventLoop) -> None:
            if address is not None:  # to those who passed sockets in, the addresses are no news
                _print(backups, address, arguments.json)
            activation.notify("READY=1")

        foreground.serve(backups, [*passed, *made], ready)


def _passed() -> list[Listener]:
    import socket

    from stasis.backup.serve.foreground import Listener
    from stasis.linux import activation

    return [Listener(socket.socket(fileno=fd)) for fd, _ in activation.listen_fds()]


def _directory(given: str) -> str:
    from stasis.backup.serve.overlay import default_directory

    return given or default_directory()


def _listen(arguments: argparse.Namespace, backups: ServedBackups, stack: contextlib.ExitStack) -> tuple[Listener, Any]:
    """A listener of our own, and what makes its exports' addresses."""
    from stasis.backup.serve.foreground import Listener
    from stasis.nbd.listeners import unix_listener
    from stasis.nbd.uri import NbdUri

    if arguments.tcp:
        return _listen_tcp(arguments)
    path = Path(arguments.socket).absolute() if arguments.socket else _default_socket(arguments, backups)
    try:
        listener = unix_listener(str(path))
    except OSError as error:
        raise StasisError(f"cannot listen on {path}: {error.strerror}",
                          hint="its directory must exist and be writable, and the path be short") from error
    stack.callback(path.unlink, missing_ok=True)
    return Listener(listener), NbdUri(socket=str(path))


def _default_socket(arguments: argparse.Namespace, backups: ServedBackups) -> Path:
    from stasis.daemon.paths import resolve

    directories = resolve(getattr(arguments, "run_dir", None), getattr(arguments, "state_dir", None))
    directories.create()
    return directories.run / "nbd" / f"backup-{backups.served[0].backup.id[:16]}.sock"


def _listen_tcp(arguments: argparse.Namespace) -> tuple[Listener, Any]:
    from stasis.backup.serve.foreground import Listener
    from stasis.daemon import sockets
    from stasis.nbd.uri import NbdUri

    options = sockets.parse_address(arguments.tcp, arguments.tls_certificates, arguments.tls_psk)
    tls = None
    if options.tls:
        from stasis.nbd.tls import TlsConfig

        directory, psk = (Path(path) if path else None for path in (options.certificates, options.psk))
        tls = TlsConfig(directory=directory, psk_file=psk)
    listener = sockets.listen_tcp(options)
    return Listener(listener, tls), NbdUri(host=options.host, port=listener.getsockname()[1], tls=options.tls)


def _print(backups: ServedBackups, address: Any, as_json: bool) -> None:
    from dataclasses import replace

    served = [
        {"id": one.backup.id, "device": one.backup.device, "size": one.backup.size, "time": one.backup.time,
         "uri": str(replace(address, export=one.backup.id)), "against": one.against}
        for one in backups.served
    ]
    if as_json:
        output.print_json_line(served)  # a program that reads a line has it all, while the command goes on
    else:
        print("\n".join(str(one["uri"]) for one in served), flush=True)


def diff(arguments: argparse.Namespace) -> None:
    """stasis backup diff"""
    from stasis.backup import serve as reading

    with open_repository(arguments, read_only=True) as repository, contextlib.ExitStack() as stack:
        stack.enter_context(reading.open_lease(repository, "diff"))
        base, target = (
            reading.open_index(repository, repository.resolve(name, host=arguments.host, device=arguments.device))
            for name in (arguments.base, arguments.target)
        )
        contents = stack.enter_context(reading.open_cache(repository)) if arguments.exact else None
        found = reading.diff(base, target, offset=arguments.offset, limit=arguments.limit, contents=contents)
        if arguments.json:
            _print_array(found)
        else:
            for extent in found:
                print(extent.offset, extent.length, "zero" if extent.zero else "data")


def _print_array(found: Iterable[Difference]) -> None:
    """One JSON array, an extent on each line, written as they are found."""
    separator = "[\n"
    for extent in found:
        print(f"{separator}  {json.dumps(extent._asdict())}", end="")
        separator = ",\n"
    print("[]" if separator == "[\n" else "\n]")
