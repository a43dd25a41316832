# SPDX-License-Identifier: Apache-2.0
"""The repository as jobs see it: keys opened, chunks stored and fetched, backups published and found."""

from __future__ import annotations

import contextlib
import secrets as random_
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from stasis.backup.repo import config as config_
from stasis.backup.repo import keys, lease, locks, manifest, tags
from stasis.backup.repo.chunks import ChunkReader, ChunkWriter, Namer
from stasis.backup.repo.config import Config
from stasis.backup.repo.index import ZERO, Index, IndexBuilder, is_whole
from stasis.backup.repo.keys import KeySlot, Secret, Secrets
from stasis.backup.repo.lease import Lease
from stasis.backup.repo.locks import LockInfo
from stasis.backup.repo.manifest import Manifest
from stasis.backup.repo.objects import Codec, Keys, Kind, object_name
from stasis.backup.repo.presence import Presence
from stasis.backup.repo.store import Store, is_hexadecimal, open_store
from stasis.errors import (
    DamagedError,
    LockedError,
    NotFoundError,
    PermissionDeniedError,
    RepositoryError,
    StorageError,
    UsageError,
)

__all__ = ["Repository"]

SHORTEST_PREFIX = 4
BUFFER_MEMORY = 96 << 20
PACK_MEMORY = 32 << 20


class Repository:
    """An open repository. May be used from any thread, its chunk readers and writers by one thread each."""

    def __init__(self, store: Store, config: Config, repository_key: bytes | None, *, read_only: bool = False) -> None:
        self.store = store
        self.url = store.url
        self.id = config.id
        self.chunk_size = config.chunk_size
        self.compression = config.compression
        self.encrypted = repository_key is not None
        self.read_only = read_only
        self._repository_key = repository_key
        self._keys = Keys(repository_key)
        self._leases: list[Lease] = []
        self.chunk_name = Namer(self._keys)
        self._presence = Presence(store)

    # Making and opening

    @classmethod
    def init(cls, url: str, *, secret: Secret | None, chunk_size: int = 1 << 20, compression: str = "zstd",
             ) -> Repository:
        """Make a repository; without a secret nothing in it is encrypted. Raises UsageError, RepositoryError."""
        config_.check(chunk_size, compression)
        store = open_store(url, create=True)
        config_.refuse_if_taken(store)
        config = Config(random_.token_hex(16), chunk_size, compression)
        repository_key = None if secret is None else random_.token_bytes(keys.KEY_BYTES)
        slot = None if secret is None or repository_key is None else config_.add_slot(store, repository_key, secret, "")
        if not config_.write(store, repository_key, config):
            if slot is not None:
                config_.remove_slot(store, slot.id)
            raise RepositoryError(f"somebody else made a repository in {url} at the same time", hint="open it")
        return cls(store, config, repository_key)

    @classmethod
    def open(cls, url: str, secrets: Secrets, *, read_only: bool = False) -> Repository:
        """Open a repository. Raises RepositoryError, PassphraseError, DamagedError."""
        store = open_store(url)
        frame, encrypted = config_.load(store)
        if secrets.given and not encrypted:
            raise RepositoryError(
                f"the repository {store.url} is not encrypted although a passphrase or key file was given",
                hint="somebody may have replaced it; give no passphrase if it is meant to be open to all")
        repository_key, config = config_.unlock(store, frame, secrets.get(store.url) if encrypted else None)
        return cls(store, config, repository_key, read_only=read_only)

    @property
    def parallelism(self) -> int:
        """Threads that are worth having: as many as the store likes and memory has buffers for."""
        return max(2, min(self.store.parallelism, BUFFER_MEMORY // (4 * self.chunk_size)))

    def close(self) -> None:
        """Give back what the repository holds. What was stored since the last `sync` may be lost."""
        for held in [*self._leases]:
            held.end()
        self._leases.clear()
        self.store.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_reading_only(self) -> None:
        if self.read_only:
            raise PermissionDeniedError(f"the repository {self.url} was opened to read only", hint="open it to write")

    # Chunks and indexes

    def codec(self) -> Codec:
        """Makes and opens frames; for one thread."""
        return Codec(self._keys, compress=self.compression == "zstd", where=self.url)

    def chunk_writer(self) -> ChunkWriter:
        """Stores chunks; for one thread."""
        self._refuse_reading_only()
        return ChunkWriter(self.store, self.codec(), self.chunk_name, self._presence)

    def chunk_reader(self) -> ChunkReader:
        """Fetches chunks; for one thread."""
        return ChunkReader(self.store, self.codec(), self.chunk_name, PACK_MEMORY // self.parallelism)

    def has_chunk(self, name: bytes) -> bool:
        """Whether a chunk is stored, or is ZERO and need not be."""
        return name == ZERO or self.store.exists(object_name(Kind.CHUNK, name))

    def index(self, of: Manifest) -> Index:
        """The chunk names of a backup."""
        return Index(of.size, of.chunk_size, [bytes.fromhex(name) for name in of.segments], self._load_segment)

    def index_builder(self, size: int | None, parent: Index | None = None) -> IndexBuilder:
        """Makes the index of a new backup of `size` bytes; None where only the end of the source tells."""
        return IndexBuilder(size, self.chunk_size, parent, self._save_segment)

    def segment(self, name: bytes) -> bytes:
        """A segment: the names of chunks one behind the other, then chains. Raises DamagedError."""
        where = object_name(Kind.SEGMENT, name)
        names = self._load(Kind.SEGMENT, where)
        if self._keys.digest(Kind.SEGMENT, names) != name:
            raise self.codec().damaged(where, "its content has another digest")
        return names

    def _load_segment(self, name: bytes, length: int) -> bytes:
        content = self.segment(name)
        if not is_whole(content, length):
            raise self.codec().damaged(object_name(Kind.SEGMENT, name), "it is not as long as the device needs")
        return content

    def _save_segment(self, names: bytes) -> bytes:
        name = self._keys.digest(Kind.SEGMENT, names)
        where = object_name(Kind.SEGMENT, name)
        if not self.store.exists(where):
            self.store.stage(where, self.codec().seal(Kind.SEGMENT, where, names))
        return name

    # Backups

    def backups(self, damaged: Callable[[DamagedError], None] | None = None) -> list[Manifest]:
        """All backups, oldest first. Raises DamagedError when a manifest is; with `damaged` that is told instead, from
        any thread, and it is left out."""
        shared: dict[str, str] = {}
        changed_tags = tags.newest_tags(self.store)

        def read(id_: str) -> Manifest | None:
            try:
                return self._backup(id_, shared, changed_tags)
            except DamagedError as error:
                if damaged is None:
                    raise
                damaged(error)
                return None

        with ThreadPoolExecutor(self.parallelism) as pool:  # a thousand round trips would take half a minute
            found = list(pool.map(read, self.backup_ids()))
        return sorted((one for one in found if one is not None), key=lambda one: (one.time, one.id))

    def backup_ids(self) -> list[str]:
        """Ids of all backups, without reading any."""
        return sorted(filter(_is_id, (info.name.rpartition("/")[2] for info in self.store.list("backups"))))

    def backup(self, id: str) -> Manifest:  # noqa: A002
        """One backup by its full id. Raises NotFoundError, DamagedError."""
        found = self._backup(id, {}, None)
        if found is None:
            raise NotFoundError(f"there is no backup {id} in {self.url}", hint="stasis backup list shows all")
        return found

    def manifest(self, id: str) -> Manifest:  # noqa: A002
        """A backup with the tags that it was made with, read at one go. Raises NotFoundError, DamagedError."""
        found = self._backup(id, {}, {})
        if found is None:
            raise NotFoundError(f"there is no backup {id} in {self.url}", hint="stasis backup list shows all")
        return found

    def resolve(self, text: str, *, host: str | None = None, device: str | None = None) -> Manifest:
        """The backup that is meant by an id, the start of one, or "latest" of a host and device.

        Raises NotFoundError, UsageError when more than one is meant.
        """
        if text == "latest":
            return self._latest(host, device)
        text = text.lower()
        matching = [id_ for id_ in self.backup_ids() if id_.startswith(text)]
        if len(text) < SHORTEST_PREFIX:
            raise UsageError(f"{text!r} is too short for a backup", hint="write four characters of its id or more")
        if len(matching) > 1:
            raise UsageError(f"{text!r} is the start of {len(matching)} backups", hint="write more of the id")
        return self.backup(matching[0] if matching else text)

    def publish(self, draft: Manifest) -> Manifest:
        """Make a backup of what was stored: the draft with its id. Raises LockedError when a lease lapsed.

        All that it names is durable before the manifest appears, and is known to have been kept until it did: a prune
        that comes later sees the manifest, and one that came earlier took the lease away (docs/design/prune.md).
        """
        self._refuse_reading_only()
        self.sync()
        self._confirm_leases()
        content = manifest.encode(draft)
        published = draft.with_id(self._keys.digest(Kind.MANIFEST, content).hex())
        where = f"backups/{published.id}"
        self.store.put(where, self.codec().seal(Kind.MANIFEST, where, content))
        try:
            self._confirm_leases()
        except LockedError:
            self.store.delete(where)
            raise
        tags.store_first_tags(self.store, self.codec(), published.id, published.tags)
        self._drop_tags_of_forgotten(published.id)
        return published

    def remove_backup(self, id: str) -> None:  # noqa: A002
        """Remove a manifest and its tags, of a backup that lost one of them too. Its chunks stay until prune."""
        self.remove_backups([id])

    def remove_backups(self, ids: Sequence[str]) -> None:
        """As `remove_backup`, at one go: a store that lists late takes its time only once."""
        self._refuse_reading_only()
        if not ids:
            return
        tags.remove_tags(self.store, ids)
        for id_ in ids:
            self.store.delete(f"backups/{id_}")
        tags.remove_tags(self.store, ids)  # those that somebody put while the manifest was still there

    def _drop_tags_of_forgotten(self, id_: str) -> None:
        """To be called when tags were put. Either this sees that the manifest is gone, or who deleted it sees them."""
        if not self.store.exists(f"backups/{id_}"):
            tags.remove_tags(self.store, [id_])

    def lost_backups(self) -> list[str]:
        """Ids of backups whose manifest is missing, though nobody forgot them."""
        tagged = set(filter(_is_id, (info.name.split("/")[1] for info in self.store.list("tags"))))
        if self.store.listing_lag:
            time.sleep(self.store.listing_lag)  # a backup is there before its tags, and is listed by now
        return sorted(id_ for id_ in tagged - set(self.backup_ids()) if self._is_lost(id_))

    def _is_lost(self, id_: str) -> bool:
        """A look at the objects themselves: the listings may be of before and after somebody forgot it."""
        tags_left = any(self.store.exists(info.name) for info in self.store.list(f"tags/{id_}"))
        return tags_left and not self.store.exists(f"backups/{id_}")

    def tags(self, id: str) -> tuple[str, ...]:  # noqa: A002
        """Tags of a backup."""
        return self.backup(id).tags

    def set_tags(self, id: str, new: Iterable[str]) -> None:  # noqa: A002
        """Replace the tags of a backup. Raises NotFoundError."""
        self._refuse_reading_only()
        self.backup(id)
        tags.store_tags(self.store, self.codec(), id, new)
        self._drop_tags_of_forgotten(id)

    def sync(self) -> None:
        """Make everything stored so far durable."""
        self.store.sync()

    def _backup(self, id_: str, shared: dict[str, str], changed_tags: dict[str, str] | None) -> Manifest | None:
        """A backup with the tags it has now; None when there is none, or no more."""
        where = f"backups/{id_}"
        codec = self.codec()
        try:
            content = codec.unseal(Kind.MANIFEST, where, self.store.get(where))
        except NotFoundError:
            return None
        if self._keys.digest(Kind.MANIFEST, content).hex() != id_:
            raise codec.damaged(where, "its content has another digest")
        try:
            found = manifest.decode(content, id_, shared)
        except (ValueError, TypeError, RecursionError) as error:
            raise codec.damaged(where, str(error)) from error
        if changed_tags is not None and id_ not in changed_tags:
            return found
        changed = tags.load_tags(self.store, codec, id_, changed_tags[id_] if changed_tags else None)
        return found if changed is None else found.with_tags(changed)

    def _latest(self, host: str | None, device: str | None) -> Manifest:
        try:
            every = self.backups()
        except DamagedError as error:
            raise DamagedError(f"which backup is the latest cannot be told: {error.message}",
                               hint="name the backup by its id; stasis backup list shows the others") from error
        fitting = [one for one in every
                   if (host is None or one.host == host) and (device is None or one.device == device)]
        if not fitting:
            of = "".join(f" {word} {value}" for word, value in (("of host", host), ("of device", device)) if value)
            raise NotFoundError(f"there is no backup{of} in {self.url}", hint="stasis backup list shows all")
        return fitting[-1]

    def _load(self, kind: Kind, where: str) -> bytes:
        """An object that must be there. Raises DamagedError."""
        codec = self.codec()
        try:
            return codec.unseal(kind, where, self.store.get(where))
        except NotFoundError as error:
            raise codec.missing(where) from error

    # Locks

    @contextlib.contextmanager
    def lock_shared(self, purpose: str, *, wait: float = 0) -> Iterator[Lease]:
        """Nothing that a backup needs is removed while this is held. Raises LockedError."""
        with self._locked(locks.SHARED, purpose, wait) as held:
            yield held

    @contextlib.contextmanager
    def lock_exclusive(self, purpose: str, *, wait: float = 0) -> Iterator[Lease]:
        """Nobody else writes or relies on anything while this is held. Raises LockedError."""
        with self._locked(locks.EXCLUSIVE, purpose, wait) as held:
            yield held

    def locks(self) -> list[LockInfo]:
        """Who holds locks."""
        return locks.list_locks(self.store, self.codec())

    def unlock(self, *, stale_only: bool = True) -> list[LockInfo]:
        """Remove locks of holders that are gone, or all; returns those that were removed."""
        removed = [lock for lock in self.locks() if lock.stale or not stale_only]
        locks.remove_locks(self.store, removed)
        return removed

    @contextlib.contextmanager
    def _locked(self, kind: str, purpose: str, wait: float) -> Iterator[Lease]:
        held = self._acquire(kind, purpose, wait)
        self._presence.forget()
        self._leases.append(held)
        try:
            yield held
        finally:
            if held in self._leases:
                self._leases.remove(held)
                held.end()

    def _acquire(self, kind: str, purpose: str, wait: float) -> Lease:
        try:
            return lease.acquire(self.store, self.codec(), kind, purpose, wait)
        except (PermissionDeniedError, StorageError):
            if not self.read_only or kind != locks.SHARED:
                raise
            return Lease(None)  # who only reads, from a disk that is full or mounted read-only, reads without

    def _confirm_leases(self) -> None:
        for held in self._leases:
            if not held.confirm():
                raise LockedError(f"the lock of this command in {self.url} lapsed before the backup was complete",
                                  hint="run the command again: what is stored already is not stored twice")

    # Keys

    def add_key(self, secret: Secret, label: str = "") -> KeySlot:
        """Let another secret open this repository."""
        if self._repository_key is None:
            raise UsageError(f"the repository {self.url} is not encrypted", hint="it has no keys")
        self._refuse_reading_only()
        return config_.add_slot(self.store, self._repository_key, secret, label)

    def key_slots(self) -> list[KeySlot]:
        """Which secrets open this repository."""
        return config_.read_slots(self.store) if self.encrypted else []

    def remove_key(self, id: str) -> KeySlot:  # noqa: A002
        """Take a secret its way in. Raises NotFoundError, UsageError for the last one."""
        self._refuse_reading_only()
        known = self.key_slots()
        matching = [slot for slot in known if slot.id.startswith(id)]
        if len(matching) != 1 or not id:
            raise NotFoundError(f"{id!r} is no key of {self.url}", hint="stasis repo key list shows all")
        if len(known) == 1:
            raise UsageError(f"{matching[0].id} is the only key of {self.url}", hint="add another key first")
        config_.remove_slot(self.store, matching[0].id)
        return matching[0]


def _is_id(name: str) -> bool:
    return is_hexadecimal(name, 64)
