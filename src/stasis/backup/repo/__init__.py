# SPDX-License-Identifier: Apache-2.0
"""The repository: a store of objects, keys, chunks, indexes, manifests and locks (docs/formats/repository.md)."""

from stasis.backup.repo.chunks import ChunkReader, ChunkWriter, StoredChunk
from stasis.backup.repo.index import ZERO, Index, IndexBuilder
from stasis.backup.repo.keys import KeySlot, Secret, Secrets
from stasis.backup.repo.lease import Lease
from stasis.backup.repo.locks import LockInfo
from stasis.backup.repo.manifest import Manifest
from stasis.backup.repo.repository import Repository

__all__ = [
    "ZERO", "ChunkReader", "ChunkWriter", "Index", "IndexBuilder", "KeySlot", "Lease", "LockInfo", "Manifest",
    "Repository", "Secret", "Secrets", "StoredChunk",
]
