# SPDX-License-Identifier: Apache-2.0
"""Forget backups: by id, or all that the rules do not keep. What they held stays until prune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from typing import Any

from stasis.backup.keep.policy import Decision, KeepPolicy, decide, group_backups
from stasis.backup.repo import Manifest, Repository
from stasis.errors import NotFoundError, UsageError

__all__ = ["ForgetGroup", "Selection", "forget_by_policy", "forget_ids", "select"]


@dataclass(frozen=True)
class Selection:
    """Which backups are meant: those that fit all that is given. tags: all of these."""

    host: str | None = None
    device: str | None = None
    set_id: str | None = None
    tags: frozenset[str] = frozenset()

    def fits(self, backup: Manifest) -> bool:
        """Whether a backup is meant. A set may be abbreviated as an id may."""
        return (self.host in (None, backup.host) and self.device in (None, backup.device)
                and (self.set_id is None or backup.set_id.startswith(self.set_id)) and self.tags <= set(backup.tags))


@dataclass
class ForgetGroup:
    """What the rules say about one group of backups."""

    group: dict[str, str]
    decisions: list[Decision] = field(default_factory=list)

    @property
    def forgotten(self) -> list[str]:
        return [decision.backup.id for decision in self.decisions if not decision.keep]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kept = [{"id": each.backup.id, "time": each.backup.time, "reasons": list(each.reasons)}
                for each in self.decisions if each.keep]
        return {"group": self.group, "keep": kept, "forget": self.forgotten}


def select(repository: Repository, selection: Selection) -> list[Manifest]:
    """The backups that are meant, oldest first."""
    return [backup for backup in repository.backups() if selection.fits(backup)]


def forget_by_policy(repository: Repository, policy: KeepPolicy, selection: Selection, by: Sequence[str], *,
                     dry_run: bool = False, zone: tzinfo | None = None) -> list[ForgetGroup]:
    """Forget what the rules do not keep; the newest backup of a device always stays. Raises UsageError."""
    if policy.is_empty:
        raise UsageError("no rule says what to keep, so nothing is forgotten",
                         hint="give --keep-last, --keep-daily or another, or name backups by their ids")
    every = repository.backups()
    newest = frozenset({(backup.host, backup.device): backup.id for backup in every}.values())
    chosen = [backup for backup in every if selection.fits(backup)]
    groups = [ForgetGroup(dict(zip(by, key, strict=True)), decide(members, policy, newest, datetime.now(UTC), zone))
              for key, members in group_backups(chosen, by).items()]
    if not dry_run:
        repository.remove_backups([id_ for group in groups for id_ in group.forgotten])
    return groups


def forget_ids(repository: Repository, ids: Sequence[str], *, dry_run: bool = False) -> list[str]:
    """Forget backups that are named, readable or not; returns their full ids. Raises NotFoundError, UsageError."""
    known = {*repository.backup_ids(), *repository.lost_backups()}
    chosen = [_full_id(repository, text, known) for text in ids]
    if not dry_run:
        repository.remove_backups(chosen)
    return chosen


def _full_id(repository: Repository, text: str, known: set[str]) -> str:
    if text == "latest" or len(text) < 4:
        return repository.resolve(text).id
    matching = sorted(id_ for id_ in known if id_.startswith(text))
    if len(matching) > 1:
        raise UsageError(f"{text!r} is the start of {len(matching)} backups", hint="write more of the id")
    if not matching:
        raise NotFoundError(f"there is no backup {text} in {repository.url}", hint="stasis backup list shows all")
    return matching[0]
