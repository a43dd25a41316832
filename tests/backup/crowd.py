# SPDX-License-Identifier: Apache-2.0
"""What one host of `test_s3_concurrent` does until it is killed: python -m tests.backup.crowd ROLE URL SEED LOG

It writes to its log what it has done, a line each: `published ID DIGEST` when a backup is complete, `forget ID` before
one is forgotten.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time

from stasis.backup.keep.prune import prune
from stasis.backup.repo import Repository, Secret, Secrets
from stasis.errors import LockedError, NotFoundError
from tests.backup.stored import CHUNK, backup_of

__all__ = ["SECRET", "digest"]

SECRET = Secret(b"secret")
WAIT = 120


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Host:
    def __init__(self, url: str, seed: int, log: int) -> None:
        self.repository = Repository.open(url, Secrets.of(SECRET))
        self.source = random.Random(seed)
        self.log = log

    def tell(self, *words: str) -> None:
        os.write(self.log, (" ".join(words) + "\n").encode())

    def write(self) -> None:
        """A backup of a few chunks that other hosts may be storing, needing or losing at the same time."""
        content = b"".join(random.Random(self.source.randrange(30)).randbytes(CHUNK)
                           for _ in range(self.source.randrange(1, 6)))
        with self.repository.lock_shared("create", wait=WAIT):
            backup = backup_of(self.repository, content, set_id=f"{self.source.random()}")
        self.tell("published", backup.id, digest(content))

    def forget(self) -> None:
        """Not a backup that is being published: docs/design/prune.md tells what becomes of that."""
        ids = self.repository.backup_ids()
        chosen = self.source.choice(ids) if len(ids) > 5 else ""
        if chosen and any(True for _ in self.repository.store.list(f"tags/{chosen}")):
            self.tell("forget", chosen)
            self.repository.remove_backup(chosen)
        time.sleep(0.05)

    def prune(self) -> None:
        try:
            prune(self.repository, wait=WAIT)
        except (LockedError, NotFoundError) as error:
            self.tell("note", str(error))
        time.sleep(self.source.uniform(0.1, 0.5))


def main(role: str, url: str, seed: str, log: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    host = Host(url, int(seed), fd)
    act = {"write": host.write, "forget": host.forget, "prune": host.prune}[role]
    host.tell("note", "ready")
    while True:
        act()


if __name__ == "__main__":
    main(*sys.argv[1:])
