# SPDX-License-Identifier: Apache-2.0
"""The config of a repository, and the way from a secret over a key slot to the key that opens it.

The config is encrypted as all else is, so that a key that opens it is the right one, and nobody without a key can make
another config that is taken for this one.
"""

from __future__ import annotations

import json
import secrets as random_
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import stasis
from stasis.backup.repo import keys
from stasis.backup.repo.keys import KeySlot, Secret
from stasis.backup.repo.objects import AES_256_GCM, FORMAT_VERSION, Codec, Header, Keys, Kind
from stasis.backup.repo.store import Store, is_hexadecimal
from stasis.errors import DamagedError, NotFoundError, PassphraseError, RepositoryError, StasisError, UsageError

__all__ = ["Config", "add_slot", "check", "load", "read_slots", "refuse_if_taken", "remove_slot", "unlock", "write"]

NAME = "config"
SLOTS = "keys"
SMALLEST_CHUNK, LARGEST_CHUNK = 64 << 10, 16 << 20
COMPRESSIONS = ("zstd", "none")


@dataclass(frozen=True)
class Config:
    """What is decided when a repository is made, and never changes. chunk_size is in bytes."""

    id: str
    chunk_size: int
    compression: str


def check(chunk_size: int, compression: str) -> None:
    """Raises UsageError when a repository cannot be made so."""
    if chunk_size & (chunk_size - 1) or not SMALLEST_CHUNK <= chunk_size <= LARGEST_CHUNK:
        raise UsageError(f"{chunk_size} bytes is no size for chunks", hint="use a power of two from 64K to 16M")
    if compression not in COMPRESSIONS:
        raise UsageError(f"{compression!r} is no compression", hint="use zstd or none")


def refuse_if_taken(store: Store) -> None:
    """Raises RepositoryError where there is a repository, or anything else. An init that was killed leaves a slot."""
    for info in store.list(""):
        if info.name == NAME:
            raise RepositoryError(f"there is a repository in {store.url} already", hint="open it, or choose another")
        if not info.name.startswith(f"{SLOTS}/"):
            raise RepositoryError(f"{store.url} is not empty: it holds {info.name}", hint="choose an empty place")


def write(store: Store, repository_key: bytes | None, config: Config) -> bool:
    """Make the store a repository; False when it is one by now."""
    fields = {"version": FORMAT_VERSION, "id": config.id, "chunk_size": config.chunk_size,
              "compression": config.compression, "created": _now(), "tool": f"stasis {stasis.__version__}"}
    codec = Codec(Keys(repository_key), compress=False, where=store.url)
    frame = codec.seal(Kind.CONFIG, NAME, json.dumps(fields).encode())
    # A put whose answer was lost is tried again, and then finds what it has put itself.
    if not store.put(NAME, frame) and store.get(NAME) != frame:
        return False
    store.sync()  # the folders above a new one, too
    return True


def load(store: Store) -> tuple[bytes, bool]:
    """The config as it is stored, and whether it is encrypted. Raises RepositoryError."""
    try:
        frame = store.get(NAME)
    except NotFoundError as error:
        raise RepositoryError(f"there is no repository in {store.url}",
                              hint="check the path or URL; stasis repo init makes a repository") from error
    header = Header.parse(frame)
    if header is None:
        raise DamagedError(f"{NAME} in {store.url} is damaged: it has no header", hint="restore it from a copy")
    _refuse_later(header.version, store.url)
    return frame, header.protection == AES_256_GCM


def unlock(store: Store, frame: bytes, secret: Secret | None) -> tuple[bytes | None, Config]:
    """The repository key and the config. Raises PassphraseError, DamagedError, RepositoryError."""
    if secret is None:
        return None, _read(store, None, frame)
    damage: StasisError | None = None
    for where in _slot_names(store):
        try:
            repository_key = _open_slot(store, where, secret)
            if repository_key is not None:
                return repository_key, _read(store, repository_key, frame)
        except DamagedError as error:  # a slot of an init that was killed opens, but not this config
            damage = error
    if damage is not None:
        raise damage
    raise PassphraseError(f"the {secret.kind.replace('-', ' ')} opens none of the keys of {store.url}",
                          hint="check it for typing errors, and that it is meant for this repository")


def add_slot(store: Store, repository_key: bytes, secret: Secret, label: str) -> KeySlot:
    """Let a secret open the repository."""
    where = f"{SLOTS}/{random_.token_hex(8)}"
    content = keys.seal_slot(repository_key, secret, name=where, label=label, created=_now(),
                             host=socket.gethostname())
    store.put(where, _open_codec(store).seal(Kind.KEY, where, content))
    return keys.describe_slot(content, where)


def read_slots(store: Store) -> list[KeySlot]:
    """All key slots. Raises DamagedError."""
    return [_describe_slot(store, where) for where in _slot_names(store)]


def remove_slot(store: Store, id_: str) -> None:
    """Remove a key slot."""
    store.delete(f"{SLOTS}/{id_}")


def _slot_names(store: Store) -> Iterator[str]:
    names = sorted(info.name for info in store.list(SLOTS) if is_hexadecimal(info.name.rpartition("/")[2], 16))
    if not names:
        raise DamagedError(f"the repository {store.url} has no {SLOTS} left, and cannot be opened without",
                           hint=f"bring back the folder {SLOTS} from a copy of the repository")
    yield from names


def _slot_content(store: Store, where: str) -> bytes:
    return _open_codec(store).unseal(Kind.KEY, where, store.get(where))


def _open_slot(store: Store, where: str, secret: Secret) -> bytes | None:
    try:
        return keys.open_slot(_slot_content(store, where), secret, name=where)
    except ValueError as error:
        raise _open_codec(store).damaged(where, str(error)) from error


def _describe_slot(store: Store, where: str) -> KeySlot:
    try:
        return keys.describe_slot(_slot_content(store, where), where)
    except ValueError as error:
        raise _open_codec(store).damaged(where, str(error)) from error


def _open_codec(store: Store) -> Codec:
    """Slots are read without a key, so their frames are not encrypted; what they wrap is."""
    return Codec(Keys(None), compress=False, where=store.url)


def _read(store: Store, repository_key: bytes | None, frame: bytes) -> Config:
    codec = Codec(Keys(repository_key), compress=False, where=store.url)
    content = codec.unseal(Kind.CONFIG, NAME, frame)
    try:
        fields = json.loads(content)
        _refuse_later(int(fields["version"]), store.url)
        config = Config(str(fields["id"]), int(fields["chunk_size"]), str(fields["compression"]))
        check(config.chunk_size, config.compression)
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise codec.damaged(NAME, "it is no config") from error
    return config


def _refuse_later(version: int, url: str) -> None:
    if version > FORMAT_VERSION:
        raise RepositoryError(f"the repository {url} has format {version}, and this stasis knows {FORMAT_VERSION}",
                              hint="use a later version of stasis")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
