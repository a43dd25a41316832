# SPDX-License-Identifier: Apache-2.0
"""`stasis settings`: the limits of the block engine."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.cli import output
from stasis.cli.options import add_command, add_group, connect
from stasis.errors import UsageError

if TYPE_CHECKING:
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(groups: Groups) -> None:
    """Add the group and its commands."""
    group = add_group(groups, "settings", "See and change the limits of the block engine.")
    add_command(group, "show", show, "Show all settings.", "stasis settings show --json")
    command = add_command(group, "set", set_, "Change settings; they are used at the next attach or take.",
                          "stasis settings set chunk_minimum_shift=18 diff_storage_minimum=1073741824")
    command.add_argument("values", metavar="NAME=VALUE", nargs="+", type=assignment, help="settings and their values")
    command = add_command(group, "load", load, "Take settings from a file in the syntax of blksnap's parameters.", """
stasis settings load /etc/modprobe.d/blksnap.conf
stasis settings load /sys/module/blksnap/parameters
""")
    command.add_argument("path", metavar="FILE", help="lines of NAME=NUMBER or of modprobe.d, or a directory in /sys")


def assignment(text: str) -> tuple[str, int]:
    """NAME=VALUE, the value a whole number."""
    name, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError
        return name.strip(), int(value)
    except ValueError as error:
        raise UsageError(f"{text!r} is no setting",
                         hint="write NAME=NUMBER; stasis settings show lists the names") from error


def show(arguments: argparse.Namespace) -> None:
    """stasis settings show"""
    with connect(arguments) as client:
        _print(client.settings(), arguments.json)


def set_(arguments: argparse.Namespace) -> None:
    """stasis settings set"""
    with connect(arguments) as client:
        changed = client.set_settings(dict(arguments.values))
    if arguments.json:
        output.print_json(changed)


def load(arguments: argparse.Namespace) -> None:
    """stasis settings load"""
    from stasis.blksnap import parameters

    found = parameters.correct(parameters.load(Path(arguments.path)))
    wanted = found.as_settings()
    with connect(arguments) as client:
        changed = client.set_settings(wanted)
    if arguments.json:
        output.print_json({"settings": changed, "unused": found.unused,
                           "corrections": [dataclasses.asdict(one) for one in found.corrections]})
        return
    for correction in found.corrections:
        print(f"corrected: {correction}")
    for name, reason in found.unused.items():
        print(f"not used: {name}: {reason}")
    _print({name: changed[name] for name in wanted}, as_json=False)


def _print(values: dict[str, int], as_json: bool) -> None:
    if as_json:
        output.print_json(values)
    else:
        output.print_table(["SETTING", "VALUE"], list(values.items()))
