# SPDX-License-Identifier: Apache-2.0
"""`stasis daemon`: run the daemon in the foreground, ask it how it is, end it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from stasis.cli import output
from stasis.cli.options import add_command, connect
from stasis.errors import BusyError, NotFoundError, UsageError

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(groups: Groups) -> None:
    """Add the command."""
    command = add_command(groups, "daemon", daemon, "Run the daemon in the foreground, or ask or end one that runs.",
                          """
stasis daemon --run-dir /run/stasis --state-dir /var/lib/stasis
stasis daemon status
stasis daemon stop --keep-serving
""")
    command.add_argument("action", metavar="ACTION", nargs="?", choices=["run", "status", "stop"], default="run",
                         help="run (the default), status, or stop")
    command.add_argument("--config", metavar="FILE",
                         help="TOML file with run_dir, state_dir and a table [settings] (with run)")
    command.add_argument("--keep-serving", action="store_true",
                         help="leave devices and snapshots served; the next daemon takes them over (with stop)")
    command.add_argument("--force", action="store_true", help="end snapshots that are held (with stop)")
    command.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)


def daemon(arguments: argparse.Namespace) -> None:
    """stasis daemon"""
    {"run": run, "status": status, "stop": stop}[arguments.action](arguments)


def run(arguments: argparse.Namespace) -> None:
    """stasis daemon run"""
    from stasis.daemon import main
    from stasis.daemon.paths import resolve

    config = _read_config(arguments.config) if arguments.config else {}
    directories = resolve(getattr(arguments, "run_dir", None) or _unless_set("STASIS_RUN_DIR", config.get("run_dir")),
                          getattr(arguments, "state_dir", None)
                          or _unless_set("STASIS_STATE_DIR", config.get("state_dir")))
    main.set_up_logging()
    main.run(directories, overrides=config.get("settings", {}), ready_fd=arguments.ready_fd)


def _unless_set(variable: str, value: str | None) -> str | None:
    return None if os.environ.get(variable) else value


def _read_config(path: str) -> dict[str, Any]:
    """The file's tables. NotFoundError, or UsageError for one that is no such file or has an unknown entry."""
    import tomllib

    try:
        with open(path, "rb") as file:
            config = tomllib.load(file)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="it is a TOML file") from error
    types = {"run_dir": str, "state_dir": str, "settings": dict}
    for name, value in config.items():
        if not isinstance(value, types.get(name, ())):
            raise UsageError(f"{path}: {name} is not understood", hint="run_dir, state_dir and [settings] are")
    return config


def status(arguments: argparse.Namespace) -> None:
    """stasis daemon status"""
    with connect(arguments, start_daemon=False) as client:
        shown = client.status()
    if arguments.json:
        output.print_json(shown)
        return
    output.print_fields([
        ("pid", shown.pid),
        ("version", shown.version),
        ("run directory", shown.run_dir),
        ("state directory", shown.state_dir),
        ("devices", shown.devices),
        ("snapshots", shown.snapshots),
    ])


def stop(arguments: argparse.Namespace) -> None:
    """stasis daemon stop"""
    with connect(arguments, start_daemon=False) as client:
        held = client.collect()
        if held and not arguments.keep_serving and not arguments.force:
            raise BusyError(f"{len(held)} snapshot(s) would end with the daemon",
                            hint="destroy them first, or add --force or --keep-serving")
        pid = client.status().pid
        client.stop(keep_serving=arguments.keep_serving)
    _await_end(pid)
    if arguments.json:
        output.print_json({"pid": pid})


def _await_end(pid: int) -> None:
    """Wait until the daemon has stopped its workers, so that the command's end means that all is quiet."""
    import select

    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(pidfd, "rb", buffering=0):
        select.select([pidfd], [], [])
