# SPDX-License-Identifier: Apache-2.0
"""What a copy or a restore writes down about itself: where it stopped, and what the complete target holds.

``TARGET.stasis-copy`` exists while a copy is unfinished.  It is written after the target's data is durable,
so the position in it is never ahead of the data.  ``user.stasis.copy`` is an extended attribute of a complete
target (a regular file whose file system has them): it lets an incremental copy refuse a base that it does not
fit.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import Field, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from stasis.errors import GenerationError, StateError

__all__ = [
    "SIDECAR_SUFFIX",
    "CopyIdentity",
    "Identity",
    "Sidecar",
    "check_base",
    "forget_base",
    "read_note",
    "record_base",
    "write_note",
]

SIDECAR_SUFFIX = ".stasis-copy"
FORMAT_VERSION = 1
BASE_ATTRIBUTE = "user.stasis.copy"


class Identity(Protocol):
    """A dataclass of plain values that tells what is written; a run goes on only with an equal one."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def describe(self) -> str:
        """One phrase for messages."""


@dataclass(frozen=True, slots=True)
class CopyIdentity:
    """What is copied: one device of one snapshot, whole (``since`` is None) or what changed since a
    number."""

    snapshot: str
    device: str
    generation: str
    change_number: int
    since: int | None = None

    def describe(self) -> str:
        """One phrase for messages."""
        what = "whole" if self.since is None else f"changed since {self.since}"
        return f"{self.device} of snapshot {self.snapshot} ({what})"


class Sidecar:
    """The resume record beside a target; replaced atomically, removed at success."""

    def __init__(self, target: Path, identity: Identity, size: int, target_inode: int) -> None:
        self.path = target.with_name(target.name + SIDECAR_SUFFIX)
        self._target = target
        self._expected = {
            "format": FORMAT_VERSION,
            "identity": asdict(identity),
            "description": identity.describe(),
            "size": size,
            "target_inode": target_inode,
        }
        self._identity = identity

    def load(self) -> int | None:
        """The position, in bytes, up to which an earlier run of this same copy is durable; None without a
        record.

        Raises StateError when the record belongs to another copy, or to another file of this name.
        """
        record = self._read()
        if record is None:
            return None
        if not isinstance(record.get("position"), int):
            raise self._mismatch("cannot be read as a record of a copy")
        self._check(record)
        return int(record["position"])

    @classmethod
    def recorded_identity(cls, target: Path) -> dict[str, Any]:
        """What an unfinished run has recorded about itself; empty where there is none, or none that can be read."""
        try:
            record = json.loads(target.with_name(target.name + SIDECAR_SUFFIX).read_text())
            return dict(record["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _read(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise self._mismatch("cannot be read as a record of a copy") from None
        if not isinstance(record, dict):
            raise self._mismatch("cannot be read as a record of a copy")
        return record

    def _check(self, record: dict[str, Any]) -> None:
        if any(record.get(key) != self._expected[key] for key in ("identity", "size")):
            raise self._mismatch(f"is of {_describe_record(record)}, not of {self._identity.describe()}")
        if record.get("target_inode") != self._expected["target_inode"]:
            raise self._mismatch("was made for another file of this name, or another disk")
        if record.get("format") != FORMAT_VERSION:
            raise self._mismatch(f"has format {record.get('format')}, known is {FORMAT_VERSION}")

    def _mismatch(self, what: str) -> StateError:
        return StateError(
            f"an unfinished copy is recorded in {self.path}, and the record {what}",
            hint=f"repeat that copy to finish it, or remove {self.path} and write the whole image to {self._target}",
        )

    def save(self, position: int) -> None:
        """Make ``position`` durable; the caller has made the target's data durable before."""
        temporary = self.path.with_name(self.path.name + ".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps({**self._expected, "position": position}).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, self.path)
        sync_directory(self.path)

    def remove(self) -> None:
        """Forget the record; the copy is complete."""
        self.path.unlink(missing_ok=True)
        sync_directory(self.path)


def _describe_record(record: dict[str, Any]) -> str:
    description = record.get("description")
    return description if isinstance(description, str) else "an unknown copy"


def sync_directory(path: Path) -> None:
    """Make the directory entry of ``path`` durable."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # A directory that cannot be synced (some FUSE and network file systems) says EINVAL; there is no
        # other way.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def record_base(descriptor: int, identity: CopyIdentity) -> None:
    """Note on a complete target what it holds."""
    write_note(descriptor, asdict(identity))


def write_note(descriptor: int, fields: dict[str, Any]) -> None:
    """Keep plain values with a target; a file system without extended attributes keeps none."""
    try:
        os.setxattr(descriptor, BASE_ATTRIBUTE, json.dumps(fields).encode())
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
            raise


def forget_base(descriptor: int) -> None:
    """Remove the note: the target is about to stop being what it says."""
    try:
        os.removexattr(descriptor, BASE_ATTRIBUTE)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.ENODATA):
            raise


def check_base(descriptor: int, target: Path, identity: CopyIdentity) -> None:
    """Refuse an incremental copy onto a target that is noted to hold another state.

    Raises GenerationError for another generation or a gap between the target's change number and ``since``,
    and StateError for a copy of another device.  A target without a note passes: then only the sample can
    tell.
    """
    base = _read_base(descriptor)
    if base is None or identity.since is None:
        return
    whole = "copy the whole image, without --since"
    if base.device != identity.device:
        raise StateError(f"{target} holds device {base.device}, not {identity.device}", hint=whole)
    if base.generation != identity.generation:
        raise GenerationError(
            f"{target} was copied in generation {base.generation} of {identity.device}, "
            f"the snapshot is of generation {identity.generation}",
            hint=whole,
        )
    if base.change_number < identity.since:
        raise GenerationError(
            f"{target} holds change number {base.change_number} of {identity.device}, "
            f"so the blocks changed since {identity.since} would leave a gap",
            hint=f"copy with --since {base.change_number}",
        )


def _read_base(descriptor: int) -> CopyIdentity | None:
    try:
        return CopyIdentity(**read_note(descriptor))
    except TypeError:
        return None  # no note, or that of a restore


def read_note(descriptor: int) -> dict[str, Any]:
    """What `write_note` has kept; empty where nothing is kept that can be read."""
    try:
        return dict(json.loads(os.getxattr(descriptor, BASE_ATTRIBUTE)))
    except (OSError, ValueError, TypeError):
        return {}
