# SPDX-License-Identifier: Apache-2.0
"""The S3 server that other tests rely on keeps S3's promises; the tests would prove nothing otherwise."""

from __future__ import annotations

import datetime
import socket
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import S3Store

from tests.backup.s3 import S3Server

RETRIES: dict[str, Any] = {
    "max_retries": 10, "retry_timeout": datetime.timedelta(seconds=60),
    "backoff": {"init_backoff": datetime.timedelta(milliseconds=5), "max_backoff": datetime.timedelta(milliseconds=50),
                "base": 2},
}


@pytest.fixture
def store(s3_url: str) -> S3Store:
    # Idle connections would stay open in this process for a while, and count as left behind.
    options: Any = {"pool_max_idle_per_host": "0", "allow_http": True}
    return S3Store.from_url(s3_url, retry_config=RETRIES, client_options=options)


def test_objects_come_back_and_go(store: S3Store) -> None:
    obstore.put(store, "a/b", b"x" * 200_000)
    obstore.put(store, "a/c", b"")
    assert bytes(obstore.get(store, "a/b").bytes()) == b"x" * 200_000
    assert sorted(each["path"] for page in obstore.list(store) for each in page) == ["a/b", "a/c"]
    obstore.delete(store, ["a/b", "a/c"])
    assert [each for page in obstore.list(store) for each in page] == []
    with pytest.raises(FileNotFoundError):
        obstore.get(store, "a/b")


def test_the_first_of_two_conditional_writes_wins(store: S3Store) -> None:
    obstore.put(store, "name", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "name", b"second", mode="create")
    assert bytes(obstore.get(store, "name").bytes()) == b"first"


def test_listings_longer_than_a_page_are_complete(store: S3Store) -> None:
    names = [f"many/{number:03}" for number in range(250)]
    for name in names:
        obstore.put(store, name, b"1")
    assert [each["path"] for page in obstore.list(store, prefix="many") for each in page] == names


def test_an_upload_that_breaks_off_leaves_nothing(s3_server: S3Server, store: S3Store) -> None:
    head = "PUT /backups/broken HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", s3_server.port)) as connection:
        connection.sendall(head.encode() + b"x" * 50_000)
    obstore.put(store, "after", b"1")
    assert not list(s3_server.directory.rglob("broken*"))


@pytest.mark.parametrize("kind", ["fail", "cut"])
def test_faults_are_over_after_their_number(s3_server: S3Server, store: S3Store, kind: str) -> None:
    s3_server.misbehave(kind, 3)
    obstore.put(store, "late", b"x" * 100_000)
    assert bytes(obstore.get(store, "late").bytes()) == b"x" * 100_000


def test_a_listing_may_be_late(s3_server: S3Server, store: S3Store) -> None:
    s3_server.misbehave("lag", 3_600_000)
    try:
        obstore.put(store, "name", b"1")
        assert [each for page in obstore.list(store) for each in page] == []
        assert bytes(obstore.get(store, "name").bytes()) == b"1"
    finally:
        s3_server.misbehave("lag", 0)
    assert [each["path"] for page in obstore.list(store) for each in page] == ["name"]
