# SPDX-License-Identifier: Apache-2.0
"""Tags of backups, which change while manifests never do: each change is a new object, the highest number holds.

`tags/<backup>/<number>-<random>`. Older objects are deleted once the newer one is there; two hosts that change the tags
of a backup at the same time leave two objects of one number, of which all readers take the same.

Number 0 is put when the backup is published, and forgetting a backup removes its tags before its manifest. So tags
without a manifest tell that the manifest was lost: a backup does not vanish unnoticed, and prune does not take its
chunks for garbage.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator

from stasis.backup.repo.objects import Codec, Kind
from stasis.backup.repo.store import ObjectInfo, Store, is_hexadecimal
from stasis.errors import NotFoundError

__all__ = ["FOLDER", "load_tags", "newest_tags", "remove_tags", "store_first_tags", "store_tags"]

FOLDER = "tags"


def newest_tags(store: Store) -> dict[str, str]:
    """For every backup whose tags were changed, the name of the object that holds them."""
    newest: dict[str, str] = {}
    for info in filter(_is_ours, store.list(FOLDER)):
        backup = info.name.split("/")[1]
        if not _is_first(info.name):
            newest[backup] = max(info.name, newest.get(backup, ""))
    return newest


def load_tags(store: Store, codec: Codec, backup: str, name: str | None = None) -> tuple[str, ...] | None:
    """Tags as they were changed last, None if never. `name` is known from `newest_tags`. Raises DamagedError."""
    while True:
        where = name or max(_objects(store, backup), default=None)
        if where is None or _is_first(where):
            return None
        try:
            return _decoded(codec, where, codec.unseal(Kind.TAGS, where, store.get(where)))
        except NotFoundError:
            name = None  # changed again since it was listed


def store_first_tags(store: Store, codec: Codec, backup: str, tags: Iterable[str]) -> None:
    """The tags that a backup is published with, which its manifest holds as well."""
    _put(store, codec, backup, 0, tags)


def store_tags(store: Store, codec: Codec, backup: str, tags: Iterable[str]) -> None:
    """Change the tags of a backup."""
    older = sorted(_objects(store, backup))
    number = int(older[-1].rpartition("/")[2][:8], 16) + 1 if older else 1
    _put(store, codec, backup, number, tags)
    for name in older:
        store.delete(name)


def _put(store: Store, codec: Codec, backup: str, number: int, tags: Iterable[str]) -> None:
    where = f"{FOLDER}/{backup}/{number:08x}-{secrets.token_hex(8)}"
    store.put(where, codec.seal(Kind.TAGS, where, json.dumps({"tags": sorted(set(tags))}).encode()))


def _is_first(name: str) -> bool:
    return name.rpartition("/")[2].startswith("00000000-")


def remove_tags(store: Store, backups: Iterable[str]) -> None:
    """Forget the tags of backups that are removed."""
    if store.listing_lag:
        time.sleep(store.listing_lag)  # tags that are left would tell that the manifest was lost
    for backup in backups:
        for name in list(_objects(store, backup)):
            store.delete(name)


def _objects(store: Store, backup: str) -> Iterator[str]:
    return (info.name for info in filter(_is_ours, store.list(f"{FOLDER}/{backup}")))


def _is_ours(info: ObjectInfo) -> bool:
    number, _, rest = info.name.rpartition("/")[2].partition("-")
    return info.name.count("/") == 2 and is_hexadecimal(number, 8) and is_hexadecimal(rest, 16)


def _decoded(codec: Codec, where: str, content: bytes) -> tuple[str, ...]:
    try:
        tags = json.loads(content)["tags"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise codec.damaged(where, "it holds no tags") from error
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise codec.damaged(where, "it holds no tags")
    return tuple(tags)
