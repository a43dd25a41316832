# SPDX-License-Identifier: Apache-2.0
"""What a stream says about its backup and the one it builds on, so that the receiver's manifest says the same.

A backup has another id in every repository, because a manifest is named by a digest under the repository's key. Set,
host, device and time stay, and are what a receiver knows a backup by.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from stasis.backup.repo import Manifest
from stasis.backup.repo.manifest import decode as decode_manifest
from stasis.backup.repo.manifest import encode as encode_manifest
from stasis.errors import DamagedError

__all__ = ["Description", "Identity", "decode", "encode", "find"]

LONGEST_NAME = 255


@dataclass(frozen=True)
class Identity:
    """What tells a backup from all others, in any repository."""

    set_id: str
    host: str
    device: str
    time: str

    @classmethod
    def of(cls, manifest: Manifest) -> Identity:
        """That of a backup."""
        return cls(manifest.set_id, manifest.host, manifest.device, manifest.time)


@dataclass(frozen=True)
class Description:
    """What a stream holds. `backup` has neither data nor size nor parent: these are the stream's."""

    backup: Manifest
    base: Identity | None


def find(backups: Iterable[Manifest], wanted: Identity) -> Manifest | None:
    """The backup of that identity."""
    return next((one for one in backups if Identity.of(one) == wanted), None)


def encode(backup: Manifest, base: Manifest | None) -> bytes:
    """The content of the record."""
    bare = replace(backup, size=0, segments=(), parent=None, statistics={})
    values: dict[str, Any] = {"backup": json.loads(encode_manifest(bare)), "base": None}
    if base is not None:
        values["base"] = vars(Identity.of(base))
    return json.dumps(values, sort_keys=True).encode()


def decode(content: bytes) -> Description:
    """The inverse. Raises DamagedError when anything in it is not what it must be."""
    try:
        values = json.loads(content)
        backup = decode_manifest(json.dumps(values["backup"]).encode(), "")
        base = None if values["base"] is None else Identity(**values["base"])
        _check(Identity.of(backup))
        if base is not None:
            _check(base)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError("the backup stream does not describe its backup as it must",
                           hint="`stasis backup send` of this version or an earlier one makes streams that do"
                           ) from error
    return Description(backup, base)


def _check(identity: Identity) -> None:
    for text in vars(identity).values():
        if not isinstance(text, str) or not 0 < len(text) <= LONGEST_NAME or not text.isprintable():
            raise ValueError("a name that is none")
    datetime.fromisoformat(identity.time)
