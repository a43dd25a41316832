# SPDX-License-Identifier: Apache-2.0
"""Which backups a command is about: options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from stasis.errors import UsageError

if TYPE_CHECKING:
    from stasis.backup.keep.forget import Selection
    from stasis.backup.repo import Manifest

__all__ = ["add_selection", "describe", "selection_of", "tag_list"]


def add_selection(parser: argparse.ArgumentParser) -> None:
    """--host, --device, --tag and --set."""
    parser.add_argument("--host", help="only backups of this host")
    parser.add_argument("--device", help="only backups of this device")
    parser.add_argument("--tag", metavar="TAG[,TAG]", type=tag_list, action="extend", default=[],
                        help="only backups that have all these tags")
    parser.add_argument("--set", metavar="ID", help="only backups of this set, made together; the start of its id")


def selection_of(arguments: argparse.Namespace) -> Selection:
    """What these options say."""
    from stasis.backup.keep.forget import Selection

    return Selection(arguments.host, arguments.device, arguments.set, frozenset(arguments.tag))


def describe(backup: Manifest) -> dict[str, Any]:
    """A backup for JSON."""
    return {
        "id": backup.id, "set": backup.set_id, "host": backup.host, "device": backup.device, "size": backup.size,
        "time": backup.time, "kind": backup.kind, "parent": backup.parent, "tags": list(backup.tags),
        "path": backup.path, "source": backup.source_kind, "identity": backup.device_identity,
        "generation": backup.generation, "change_number": backup.change_number, "chunk_size": backup.chunk_size,
        "consistency": backup.consistency, "note": backup.note, "tool": backup.tool,
        "statistics": dict(backup.statistics),
    }


def tag_list(text: str) -> list[str]:
    """Tags with commas between; nothing is no tag."""
    tags = [tag.strip() for tag in text.split(",")] if text.strip() else []
    if not all(tags):
        raise UsageError(f"{text!r} holds an empty tag", hint="write tags with commas between, as in daily,offsite")
    if not text.isprintable():
        raise UsageError(f"{text!r} cannot be a tag", hint="use characters that can be seen")
    return tags
