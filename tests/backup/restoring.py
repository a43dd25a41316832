# SPDX-License-Identifier: Apache-2.0
"""Repositories with backups whose contents the tests choose, without a job that makes them; and ways to spoil them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stasis.backup.repo import ChunkReader, Manifest, Repository, Secret, keys
from stasis.linux import files

__all__ = ["CHUNK", "data_in", "image", "new_repository", "objects", "publish", "sidecar_of", "stopping_after"]

CHUNK = 64 * 1024


def image(size: int, seed: int = 1) -> bytes:
    """Chunks of random bytes, of zeroes, and of random bytes among zeroes, a third each."""
    draw = random.Random(seed)
    makers: list[Callable[[], bytes]] = [
        lambda: draw.randbytes(CHUNK),
        lambda: bytes(CHUNK),
        lambda: bytes(20_000) + draw.randbytes(9000) + bytes(CHUNK - 29_000),
    ]
    return b"".join(draw.choice(makers)() for _ in range(-(-size // CHUNK)))[:size]


def new_repository(path: Path, *, chunk_size: int = CHUNK, secret: Secret | None = None,
                   compression: str = "none") -> Repository:
    """A repository whose passphrase, if there is one, opens it in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "SCRYPT_N", 16)
        return Repository.init(str(path), secret=secret, chunk_size=chunk_size, compression=compression)


def publish(repository: Repository, data: bytes, **fields: Any) -> Manifest:
    """Store `data` as a backup."""
    size, chunk_size = len(data), repository.chunk_size
    writer, builder = repository.chunk_writer(), repository.index_builder(size)
    for number, offset in enumerate(range(0, size, chunk_size)):
        builder.set(number, writer.store(memoryview(data)[offset : offset + chunk_size]).name)
    values: dict[str, Any] = {
        "set_id": "5e7", "host": "host", "device": "disk", "path": "/disk", "source_kind": "file",
        "device_identity": "disk", "time": "2026-01-02T03:04:05.000006Z", "kind": "full", "generation": None,
    }  # fmt: skip
    segments = tuple(name.hex() for name in builder.finish())
    draft = Manifest(size=size, chunk_size=chunk_size, segments=segments, **{**values, **fields})
    return repository.publish(draft)


def objects(repository: Repository, folder: str) -> list[Path]:
    """The files of a kind of object in a local repository."""
    return sorted(path for path in (Path(repository.url) / folder).rglob("*") if path.is_file())


def sidecar_of(target: Path) -> Path:
    return target.with_name(target.name + ".stasis-copy")


def data_in(path: Path) -> list[tuple[int, int]]:
    """Extents of a file that are no holes."""
    with path.open("rb") as file:
        found = files.data_extents(file.fileno(), 0, path.stat().st_size)
        return [(offset, length) for offset, length, is_data in found if is_data]


@contextmanager
def stopping_after(monkeypatch: pytest.MonkeyPatch, fetches: int, error: BaseException) -> Iterator[None]:
    """Raise `error` instead of fetching one chunk more."""
    fetch, left = ChunkReader.fetch, [fetches]

    def counted(self: ChunkReader, name: bytes, into: memoryview) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        fetch(self, name, into)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkReader, "fetch", counted)
        yield
