# SPDX-License-Identifier: Apache-2.0
"""An object store that fails now and then, answers late or forgets to answer; requests are counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore.exceptions as refused
import pytest
from obstore.store import MemoryStore

from stasis.backup.repo import Repository, Secret, Secrets, awsprofile, cloud, keys
from stasis.backup.repo.cloud import CloudStore
from stasis.backup.repo.objects import Kind, object_name
from stasis.errors import NotFoundError, PermissionDeniedError, RepositoryError, UsageError

BUSY = refused.GenericError("503 Slow Down\n\nDebug source: long")


class Flaky:
    """A MemoryStore that counts requests; `answers` holds what the next ones of a kind do instead, or after."""

    def __init__(self) -> None:
        self.memory = MemoryStore()
        self.requests: Counter[str] = Counter()
        self.before: dict[str, list[Exception | None]] = {}
        self.after: dict[str, list[Exception | None]] = {}

    def _do(self, kind: str, call: Callable[[], Any]) -> Any:
        self.requests[kind] += 1
        self._raise(self.before.get(kind))
        result = call()
        self._raise(self.after.get(kind))
        return result

    @staticmethod
    def _raise(errors: list[Exception | None] | None) -> None:
        error = errors.pop(0) if errors else None
        if error is not None:
            raise error

    def put(self, name: str, data: bytes, **options: Any) -> Any:
        return self._do("put", lambda: self.memory.put(name, data, **options))

    def get(self, name: str) -> Any:
        return self._do("get", lambda: self.memory.get(name))

    def head(self, name: str) -> Any:
        return self._do("head", lambda: self.memory.head(name))

    def delete(self, name: str) -> None:
        self._do("delete", lambda: self.memory.delete(name))

    def list(self, prefix: str | None, *, offset: str | None, chunk_size: int) -> Iterator[Any]:
        pages = self._do("list", lambda: self.memory.list(prefix, offset=offset, chunk_size=10))
        for page in pages:
            self._do("page", lambda: None)
            yield page


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Flaky:
    monkeypatch.setattr(cloud, "FIRST_PAUSE_SECONDS", 0.0001)
    monkeypatch.setattr(cloud, "LONGEST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(keys, "SCRYPT_N", 16)
    objects = Flaky()
    monkeypatch.setattr(cloud, "_connect", lambda url: objects)
    return objects


@pytest.fixture
def store(flaky: Flaky) -> CloudStore:
    return CloudStore("s3://bucket/prefix")


def test_an_object_is_never_replaced(store: CloudStore) -> None:
    assert store.put("a/b", b"first", b" part")
    assert not store.put("a/b", b"second")
    assert store.get("a/b") == b"first part"
    assert (store.exists("a/b"), store.exists("a")) == (True, False)


@pytest.mark.parametrize("kind", ["put", "get", "head", "delete", "list", "page"])
def test_what_passes_is_tried_again(store: CloudStore, flaky: Flaky, kind: str) -> None:
    flaky.memory.put("a/there", b"content")
    flaky.before[kind] = [BUSY, OSError(104, "connection reset"), refused.GenericError("timed out")]
    assert store.put("a/new", b"x")
    assert store.get("a/there") == b"content"
    assert store.stat("a/there") is not None
    store.delete("a/there")
    assert [info.name for info in store.list("a")] == ["a/new"]
    assert flaky.requests[kind] >= 4


def test_a_put_whose_answer_was_lost_is_no_failure(store: CloudStore, flaky: Flaky) -> None:
    flaky.after["put"] = [BUSY]
    store.put("a/b", b"content")
    assert (store.get("a/b"), flaky.requests["put"]) == (b"content", 2)


def test_a_repository_is_made_though_every_answer_is_lost_once(flaky: Flaky) -> None:
    flaky.after["put"] = [BUSY, None, BUSY]
    Repository.init("s3://bucket/x", secret=Secret(b"word")).close()
    with Repository.open("s3://bucket/x", Secrets.of(Secret(b"word"))) as repository:
        assert repository.encrypted


def test_who_waits_is_told_once_what_for(
    store: CloudStore, flaky: Flaky, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flaky.memory.put("a/b", b"content")
    flaky.before["get"] = [BUSY] * 3
    store.get("a/b")
    assert not caplog.messages
    monkeypatch.setattr(cloud, "TOLD_FROM_SECONDS", 0.0005)
    flaky.before["get"] = [BUSY] * 8
    store.get("a/b")
    assert caplog.messages == ["s3://bucket/prefix does not answer and is tried again for 3 minutes: 503 Slow Down"]


def test_what_lasts_is_told_and_names_the_object(store: CloudStore, flaky: Flaky) -> None:
    store.patience = 0.02
    flaky.before["get"] = [BUSY] * 10000
    with pytest.raises(RepositoryError, match=r"s3://bucket/prefix does not answer for a/b: 503 Slow Down$"):
        store.get("a/b")
    assert flaky.requests["get"] > 3


@pytest.mark.parametrize("error", [refused.PermissionDeniedError("no"), refused.UnauthenticatedError("no")])
def test_a_refusal_is_told_at_once(store: CloudStore, flaky: Flaky, error: Exception) -> None:
    flaky.before["put"] = [error]
    with pytest.raises(PermissionDeniedError, match="a/b"):
        store.put("a/b", b"x")
    assert flaky.requests["put"] == 1


def test_stores_without_conditional_writes(store: CloudStore, flaky: Flaky) -> None:
    flaky.before["put"] = [refused.NotSupportedError("If-None-Match")]
    assert store.put("a/b", b"content")
    assert store.get("a/b") == b"content"


def test_a_listing_that_breaks_goes_on_where_it_was(store: CloudStore, flaky: Flaky) -> None:
    names = {f"a/{number:03}" for number in range(57)}
    for name in names:
        flaky.memory.put(name, b"")
    flaky.before["page"] = [None, BUSY, None, None, BUSY, BUSY, None]
    found = [info.name for info in store.list("a")]
    assert (set(found), len(found), flaky.requests["list"]) == (names, 57, 4)


def test_missing_objects(store: CloudStore) -> None:
    for get in (store.get, lambda name: store.get_into(name, [memoryview(bytearray(4))])):
        with pytest.raises(NotFoundError, match="a/b"):
            get("a/b")
    store.delete("a/b")
    assert list(store.list("none")) == []


def test_reading_into_buffers(store: CloudStore) -> None:
    store.put("a", b"0123456789")
    small, large = bytearray(4), bytearray(20)
    assert store.get_into("a", [memoryview(small)]) == 10
    assert store.get_into("a", [memoryview(small), memoryview(large)]) == 10
    assert (small, large) == (b"0123", b"456789" + bytes(14))


def _data(number: int) -> memoryview:
    return memoryview(hashlib.sha256(b"%d" % number).digest() * 2048)


def test_a_new_chunk_costs_one_request_and_a_known_one_too(flaky: Flaky) -> None:
    Repository.init("s3://bucket/x", secret=None, chunk_size=65536).close()
    with Repository.open("s3://bucket/x", Secrets.none()) as repository:
        for shard in repository._presence._shards:
            shard.lookups = 1  # as after a thousand chunks
        flaky.requests.clear()
        writer = repository.chunk_writer()
        assert all(writer.store(_data(number)).new for number in range(300))
        assert (flaky.requests["put"], flaky.requests["head"]) == (300, 0)
        assert not any(writer.store(_data(number)).new for number in range(300))
        assert (flaky.requests["put"], flaky.requests["head"]) == (300, 0)
    with Repository.open("s3://bucket/x", Secrets.none()) as repository:
        flaky.requests.clear()
        writer = repository.chunk_writer()
        assert not any(writer.store(_data(number)).new for number in range(300))
        assert (flaky.requests["put"], flaky.requests["head"]) == (0, 300)


def test_a_chunk_that_vanished_since_it_was_listed_is_stored_again(flaky: Flaky) -> None:
    Repository.init("s3://bucket/x", secret=None, chunk_size=65536).close()
    with Repository.open("s3://bucket/x", Secrets.none()) as first:
        name = first.chunk_writer().store(_data(1)).name
    with Repository.open("s3://bucket/x", Secrets.none()) as repository:
        repository._presence._shards[name[0]].lookups = 1
        assert not repository.chunk_writer().store(_data(1)).new
        flaky.memory.delete(object_name(Kind.CHUNK, name))
        assert repository.chunk_writer().store(_data(1)).new


def test_a_chunk_that_another_host_stored_meanwhile_is_fine(flaky: Flaky) -> None:
    Repository.init("s3://bucket/x", secret=None, chunk_size=65536).close()
    one, two = (Repository.open("s3://bucket/x", Secrets.none()) for _ in range(2))
    with one, two:
        for shard in one._presence._shards:
            shard.lookups = 1
        assert not one.chunk_writer().store_known(one.chunk_name(_data(1)))
        assert two.chunk_writer().store(_data(1)).new
        assert not one.chunk_writer().store(_data(1)).new
        assert one.chunk_writer().store_known(one.chunk_name(_data(1)))


def test_a_large_repository_is_listed_later(flaky: Flaky) -> None:
    """A listing of many pages must be worth more single questions."""
    Repository.init("s3://bucket/x", secret=None, chunk_size=65536).close()
    with Repository.open("s3://bucket/x", Secrets.none()) as repository:
        for number in range(5000):
            flaky.memory.put(f"chunks/07/07{number:062x}", b"")
        repository._presence._shards[7].lookups = 1
        assert not repository.chunk_writer().store_known(bytes([7] * 32))
        assert repository._presence._few == 5


def test_the_profile_of_the_aws_tools_holds(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = two\n[work]\naws_access_key_id = three\n")
    (tmp_path / ".aws/config").write_text("[default]\nregion = eu-west-1\n[profile work]\nendpoint_url = http://here\n")
    home = {"HOME": str(tmp_path)}
    default = {"access_key_id": "one", "secret_access_key": "two", "region": "eu-west-1"}
    assert awsprofile.settings(home) == default
    assert awsprofile.settings({**home, "AWS_PROFILE": "work"}) == {"access_key_id": "three", "endpoint": "http://here"}
    assert awsprofile.settings({**home, "AWS_ACCESS_KEY_ID": "x", "AWS_REGION": "y"}) == {}
    assert awsprofile.settings({"HOME": "/nowhere"}) == {}
    assert awsprofile.endpoint({"AWS_ENDPOINT_URL": "http://a"}, {"endpoint": "http://b"}) == "http://a"
    assert awsprofile.endpoint({}, {"endpoint": "http://b"}) == "http://b"


def test_azure_s_account_is_taken_from_the_environment_as_az_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    objects: Any = cloud._connect("az://container/prefix")
    assert (objects.prefix, objects.config["account_name"]) == ("prefix", "account")


@pytest.mark.parametrize("url", ["ftp://host/x", "http://host/x", "s3://", "az://container/x"])
def test_urls_that_name_no_store(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=url.split(":")[0]):
        Repository.open(url, Secrets.none())
