# SPDX-License-Identifier: Apache-2.0
"""The commands of blksnap's console tool with their options, and what became of the words of its older versions.

The names are those of blksnap's `master` and `stable-v2.0` branches. `--json` is on every command here.
"""

from __future__ import annotations

from dataclasses import dataclass

from stasis.blksnap.console.grammar import FLAG, MANY, ONE, Option

__all__ = ["ALIASES", "COMMANDS", "REPLACED", "Command", "command"]


@dataclass(frozen=True)
class Command:
    """A command: its word, what it does in a sentence, and its options."""

    name: str
    text: str
    options: tuple[Option, ...]


HELP = Option("help", "h", FLAG, "Print usage for command.")
JSON = Option("json", "j", FLAG, "Print the result as JSON, errors too.")
DEVICE = Option("device", "d", ONE, "Path of the device, or of its node.")
ID = Option("id", "i", ONE, "UUID of the snapshot.")


def _command(name: str, text: str, *options: Option) -> Command:
    return Command(name, text, (HELP, *options, JSON))


_ALL = (
    _command("version", "Print the version of the blksnap interface."),
    _command("attach", "Attach the filter to a block device, so that changes are tracked.", DEVICE),
    _command("detach", "Detach the filter from a block device.", DEVICE),
    _command("cbtinfo", "Print the figures of a device's change tracking.", DEVICE),
    _command(
        "readcbtmap",
        "Write the table of changes to a file.",
        DEVICE,
        Option("file", "f", ONE, "File for the table, one byte per block."),
    ),
    _command(
        "markdirtyblock",
        "Mark blocks as changed: ranges of a device, or those that a file occupies.",
        Option("file", "f", ONE, "A file, whose blocks are marked."),
        DEVICE,
        Option("ranges", "r", MANY, "Ranges SECTOR:COUNT, in sectors of 512 bytes."),
    ),
    _command("snapshot_add", "Add a device to a snapshot that is not taken yet.", DEVICE, ID),
    _command(
        "snapshot_create",
        "Create a snapshot and print its UUID.",
        Option("device", "d", MANY, "Devices for the snapshot."),
        Option("file", "f", ONE, "Where old data goes: file, directory or block device."),
        Option("limit", "l", ONE, "The most it may take, with K, M or G."),
    ),
    _command("snapshot_destroy", "Release a snapshot.", ID),
    _command("snapshot_take", "Take a snapshot of all its devices at one instant.", ID),
    _command(
        "snapshot_info",
        "Print the state and the image of a device in a snapshot.",
        DEVICE,
        Option("field", "f", ONE, "Print one value only: image or error_code."),
    ),
    _command(
        "snapshot_waitevent",
        "Wait for an event of a snapshot and print it.",
        ID,
        Option("timeout", "t", ONE, "Milliseconds to wait."),
    ),
    _command("snapshot_collect", "Print the UUIDs of all snapshots."),
    _command("snapshot_watcher", "Print the events of a snapshot until it is released.", ID),
    _command("tracker_collect", "Print the figures of all devices that are tracked (stable-v1.0)."),
)

COMMANDS = {command.name: command for command in _ALL}

ALIASES = {
    "tracker_remove": "detach",
    "tracker_readcbtmap": "readcbtmap",
    "tracker_markdirtyblock": "markdirtyblock",
}
"""Words of stable-v1.0 whose meaning a command has today."""

REPLACED = {
    "snapshot_appendstorage": "give 'snapshot_create' the options --file and --limit: the storage grows by itself",
    "stretch_snapshot": "give 'snapshot_create' the options --file and --limit, and watch with 'snapshot_watcher'",
    "setlog": "the log is daemon.log in the directory of 'stasis daemon'",
    "mod": "print the version with 'version'",
}
"""Words of older versions that are refused, and what to do instead."""


def command(word: str) -> Command | None:
    """The command of this name, which may be an older one; None if there is none."""
    return COMMANDS.get(ALIASES.get(word, word))
