# SPDX-License-Identifier: Apache-2.0
"""Hosts that write, forget and prune in one repository at the same time, killed at random points, lose nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stasis.backup.keep.check import check
from stasis.backup.keep.prune import prune
from stasis.backup.repo import Repository, Secrets, keys
from tests.backup.crowd import SECRET, digest
from tests.backup.s3 import S3Server
from tests.backup.stored import CHUNK, backup_of, content_of

ROOT = Path(__file__).parents[2]
ROLES = ("write", "write", "write", "forget", "prune")
KILLS = 120 if os.environ.get("STASIS_LONG") else 8


class Crowd:
    """Processes, one per role, each started anew when it is killed."""

    def __init__(self, url: str, directory: Path, seed: int) -> None:
        self.url = url
        self.directory = directory
        self.source = random.Random(seed)
        self.processes = [self._start(number) for number in range(len(ROLES))]

    def kill_one(self) -> None:
        number = self.source.randrange(len(ROLES))
        self.assert_alive()
        self.processes[number].kill()
        self._end(number)
        self.processes[number] = self._start(number)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()

    def assert_alive(self) -> None:
        """A process that ended by itself has failed."""
        for number, process in enumerate(self.processes):
            if process.poll() is not None:
                self._end(number)

    def told(self, word: str) -> list[list[str]]:
        """What the hosts said they have done."""
        lines = [line for log in self.directory.glob("*.log") for line in log.read_text().splitlines()]
        return [rest for first, *rest in (line.split(" ") for line in lines) if first == word]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        seed = self.source.randrange(1 << 30)
        log = self.directory / f"{number}-{seed}.log"
        return subprocess.Popen([sys.executable, "-m", "tests.backup.crowd", ROLES[number], self.url, str(seed),
                                 str(log)], cwd=ROOT, stderr=subprocess.PIPE)

    def _end(self, number: int) -> None:
        _, errors = self.processes[number].communicate()
        assert self.processes[number].returncode == -9, errors.decode()


@pytest.fixture(autouse=True)
def _cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_N", 16)


def _live_through(url: str, directory: Path, seed: int, server: S3Server | None = None) -> None:
    Repository.init(url, secret=SECRET, chunk_size=CHUNK).close()
    crowd = Crowd(url, directory, seed)
    try:
        for _ in range(KILLS):
            before = len(crowd.told("published"))
            _wait_until_more(crowd, before + 2)
            if server is not None:
                server.misbehave(crowd.source.choice(["fail", "cut"]), 3)
            time.sleep(crowd.source.uniform(0, 0.1))  # so that the kill does not always come at the same place
            crowd.kill_one()
        crowd.assert_alive()
    finally:
        crowd.stop()
    _assert_whole(url, crowd)


def _wait_until_more(crowd: Crowd, published: int) -> None:
    deadline = time.monotonic() + 120
    while len(crowd.told("published")) < published:
        crowd.assert_alive()
        assert time.monotonic() < deadline, crowd.told("note")
        time.sleep(0.02)


def _assert_whole(url: str, crowd: Crowd) -> None:
    published = {words[0]: words[1] for words in crowd.told("published")}
    forgotten = {id_ for id_, in crowd.told("forget")}
    with Repository.open(url, Secrets.of(SECRET)) as repository:
        assert check(repository, read_share=1).problems == []
        backups = {backup.id: backup for backup in repository.backups()}
        assert set(published) - forgotten <= set(backups)
        for id_ in set(published) & set(backups):
            assert digest(content_of(repository, backups[id_])) == published[id_]
        prune(repository)  # the locks of the killed hold nobody up
        result = check(repository, read_share=1)
        young = len(list(repository.store.list("clock")))  # looks at the clock that were cut short; prune waits an hour
        assert (result.problems, result.garbage_objects) == ([], young)


def test_a_folder(tmp_path: Path, seed: int) -> None:
    _live_through(str(tmp_path / "repository"), tmp_path, seed)


def test_an_s3_server_that_fails_now_and_then(s3_server: S3Server, s3_url: str, tmp_path: Path, seed: int) -> None:
    _live_through(s3_url, tmp_path, seed, s3_server)


def test_prune_on_a_server_that_lists_late(s3_server: S3Server, s3_url: str) -> None:
    """What was published a moment ago is in no listing yet, and is pruned by nobody."""
    source = random.Random(1)
    shared, fresh = source.randbytes(CHUNK), source.randbytes(CHUNK)
    with Repository.init(s3_url, secret=SECRET, chunk_size=CHUNK) as writer, \
            Repository.open(s3_url, Secrets.of(SECRET)) as pruner:
        writer.remove_backup(backup_of(writer, shared).id)
        for repository in (writer, pruner):
            repository.store.listing_lag = 0.5
        s3_server.misbehave("lag", 300)
        try:
            with writer.lock_shared("create"):
                backup = backup_of(writer, shared + fresh)
            prune(pruner)
        finally:
            s3_server.misbehave("lag", 0)
        assert content_of(writer, backup) == shared + fresh
        assert check(writer, read_share=1).problems == []


def test_a_server_that_refuses_for_a_while_costs_time_and_nothing_else(s3_server: S3Server, s3_url: str) -> None:
    content = random.Random(2).randbytes(20 * CHUNK)
    with Repository.init(s3_url, secret=None, chunk_size=CHUNK) as repository:
        s3_server.misbehave("fail", 4)
        with repository.lock_shared("create"):
            backup = backup_of(repository, content)
        s3_server.misbehave("cut", 4)
        assert content_of(repository, backup) == content
        s3_server.misbehave("fail", 4)
        assert check(repository, read_share=1).problems == []
