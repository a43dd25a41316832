# SPDX-License-Identifier: Apache-2.0
"""Looks at the small objects of a repository one by one: key slots, manifests, tags, locks.

The config is not among them: a repository whose config is damaged cannot be opened, and opening names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from stasis.backup.keep import layout
from stasis.backup.keep.threads import in_threads
from stasis.backup.repo import Repository, keys
from stasis.backup.repo.objects import Codec, Keys, Kind
from stasis.errors import DamagedError, NotFoundError

__all__ = ["Damage", "damaged"]

Damage = tuple[str, str, str | None]
"""Name of the object, what is wrong with it, and the id of the backup that it belongs to."""


def damaged(repository: Repository) -> Iterator[Damage]:
    """All small objects that are not what they must be, or not there."""
    yield from _damaged_slots(repository)
    yield from _damaged_backups(repository)
    for folder, kind in (("tags", Kind.TAGS), ("locks", Kind.LOCK)):
        for info in filter(layout.is_ours, repository.store.list(folder)):
            if reason := _reason(_unseal, repository.codec(), repository, kind, info.name):
                yield info.name, reason, info.name.split("/")[1] if kind is Kind.TAGS else None


def _damaged_backups(repository: Repository) -> Iterator[Damage]:
    ids = repository.backup_ids()
    reasons = in_threads(lambda id_: _reason(repository.manifest, id_), ids, repository.parallelism)
    for id_, reason in zip(ids, reasons, strict=True):
        if reason:
            yield f"backups/{id_}", reason, id_
    for id_ in repository.lost_backups():
        yield f"backups/{id_}", f"backups/{id_} is missing in the repository {repository.url}", id_


def _damaged_slots(repository: Repository) -> Iterator[Damage]:
    """Slots are sealed without a key, so that a key can be got out of them."""
    codec = Codec(Keys(None), compress=False, where=repository.url)
    for info in filter(layout.is_ours, repository.store.list("keys")):
        if reason := _reason(_describe_slot, codec, repository, info.name):
            yield info.name, reason, None


def _unseal(codec: Codec, repository: Repository, kind: Kind, name: str) -> bytes:
    return codec.unseal(kind, name, repository.store.get(name))


def _describe_slot(codec: Codec, repository: Repository, name: str) -> None:
    try:
        keys.describe_slot(_unseal(codec, repository, Kind.KEY, name), name)
    except ValueError as error:
        raise codec.damaged(name, str(error)) from error


def _reason(look: Callable[..., object], *arguments: object) -> str | None:
    """Why a look at an object failed; None when it did not, or when the object is gone by now."""
    try:
        look(*arguments)
    except NotFoundError:
        return None
    except DamagedError as error:
        return error.message
    return None
