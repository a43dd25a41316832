# SPDX-License-Identifier: Apache-2.0
"""The manifest: everything about one backup but its data. Its id is a digest of it, so it cannot be another's.

Through the names of the segments, which are digests as well, the id covers every byte of the backup.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["Manifest", "decode", "encode"]

KINDS = ("full", "incremental", "differential")
CONSISTENCIES = ("crash", "frozen", "hooks")


@dataclass(frozen=True)
class Manifest:
    """One backup of one device. `id` is empty in a draft. Sizes are bytes, `time` is RFC 3339 in UTC."""

    set_id: str
    host: str
    device: str
    path: str
    source_kind: str
    device_identity: str
    size: int
    chunk_size: int
    time: str
    kind: str
    segments: tuple[str, ...]
    id: str = ""
    parent: str | None = None
    generation: str | None = None
    change_number: int | None = None
    tags: tuple[str, ...] = ()
    statistics: Mapping[str, int] = field(default_factory=dict)
    consistency: str = "crash"
    note: str = ""
    tool: str = ""

    @property
    def chunk_count(self) -> int:
        """How many chunks the device has; the last one may be short."""
        return -(-self.size // self.chunk_size)

    def with_id(self, id: str) -> Manifest:  # noqa: A002
        """The same with its id."""
        return replace(self, id=id)

    def with_tags(self, tags: tuple[str, ...]) -> Manifest:
        """The same with other tags."""
        return replace(self, tags=tags)


def encode(manifest: Manifest) -> bytes:
    """The content of the object; the id is not in it, as it is the digest of this."""
    values = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name != "id"}
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def decode(content: bytes, id: str, shared: dict[str, str] | None = None) -> Manifest:  # noqa: A002
    """The inverse. Raises ValueError when a field is missing or of a wrong type. Fields that this version does not
    know are left out. `shared` keeps one copy of segment names that many manifests have in common."""
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    known: dict[str, Any] = {name: _checked(name, values.get(name)) for name in _CHECKS}
    pool = {} if shared is None else shared
    known["segments"] = tuple(pool.setdefault(name, name) for name in known["segments"])
    known["tags"] = tuple(known["tags"])
    manifest = Manifest(id=id, **known)
    if len(manifest.segments) != -(-manifest.chunk_count // 4096):
        raise ValueError("segments do not fit its size")
    return manifest


def _checked(name: str, value: Any) -> Any:
    if not _CHECKS[name](value):
        raise ValueError(f"{name} is not what it must be")
    return value


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _digest(value: Any) -> bool:
    return _text(value) and len(value) == 64 and not value.strip("0123456789abcdef")


_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("set_id", "host", "device", "path", "source_kind", "device_identity", "time", "note", "tool"),
                    _text),
    "size": _number,
    "chunk_size": lambda value: _number(value) and value > 0 and not value & (value - 1),
    "kind": KINDS.__contains__,
    "consistency": CONSISTENCIES.__contains__,
    "segments": lambda value: isinstance(value, list) and all(map(_digest, value)),
    "parent": lambda value: value is None or _digest(value),
    "generation": lambda value: value is None or _text(value),
    "change_number": lambda value: value is None or _number(value),
    "tags": _texts,
    "statistics": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
}
