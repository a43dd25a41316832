# SPDX-License-Identifier: Apache-2.0
"""A repository in an object store: S3 and what speaks like it, Google and Azure storage, through obstore.

Credentials come from the environment as the tools of these stores take them, never from a command line. What may pass
(503, 500, time-outs, broken connections) is tried again with growing pauses before it is an error.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import obstore.exceptions
from obstore.store import MemoryStore, from_url

from stasis.backup.repo import awsprofile
from stasis.backup.repo.store import Buffer, ObjectInfo, refuse_size
from stasis.errors import NotFoundError, PermissionDeniedError, RepositoryError, UsageError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

__all__ = ["CloudStore"]

Result = TypeVar("Result")

PARALLELISM = 16
PATIENCE_SECONDS = 180.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 15.0
TOLD_FROM_SECONDS = 2.0
# The library tries again by itself what it knows to be harmless; the rest, and what lasts longer, is tried here.
RETRIES: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
REQUEST_SECONDS = 300  # a chunk of 16 MiB on a slow line, among fifteen others

# What the az command takes and obstore does not; the names that obstore takes are in docs/guide/repo.md.
AZURE_NAMES = {"AZURE_STORAGE_ACCOUNT": "account_name", "AZURE_STORAGE_KEY": "account_key",
               "AZURE_STORAGE_SAS_TOKEN": "sas_key"}

logger = logging.getLogger(__name__)

_memory: dict[str, MemoryStore] = {}  # memory:// of this process, for tests


class CloudStore:
    """Objects in a bucket or container, below a prefix."""

    parallelism = PARALLELISM
    cheap_lookup = False

    def __init__(self, url: str, objects: ObjectStore | None = None) -> None:
        self.url = url
        self.listing_lag = 0.0
        self.patience = PATIENCE_SECONDS
        self._told = False
        self._objects = _connect(url) if objects is None else objects

    def put(self, name: str, *parts: Buffer) -> bool:
        data = bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
        try:
            self._tried(name, lambda: self._objects.put(name, data, mode="create", use_multipart=False))
        except obstore.exceptions.AlreadyExistsError:
            return False
        except obstore.exceptions.NotSupportedError:
            # Names are random or follow from the content: what is there can only be the same.
            self._tried(name, lambda: self._objects.put(name, data, use_multipart=False))
        return True

    def stage(self, name: str, *parts: Buffer) -> bool:
        return self.put(name, *parts)

    def get(self, name: str) -> bytes:
        return bytes(self._content(name))

    def get_into(self, name: str, buffers: Sequence[memoryview]) -> int:
        content = self._content(name)
        start = 0
        for buffer in buffers:
            piece = content[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            start += len(piece)
        return len(content)

    def _content(self, name: str) -> memoryview:
        def fetch() -> memoryview:
            answer = self._objects.get(name)
            refuse_size(name, self.url, answer.meta["size"])
            return memoryview(answer.bytes())

        return self._tried(name, fetch)

    def exists(self, name: str) -> bool:
        return self.stat(name) is not None

    def stat(self, name: str) -> ObjectInfo | None:
        try:
            return _info(self._tried(name, lambda: self._objects.head(name)))
        except NotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """A listing that breaks off goes on behind the last name that came."""
        listing = _Listing(self._objects, prefix)
        while page := self._tried(prefix, listing.page):
            yield from map(_info, page)

    def delete(self, name: str) -> None:
        try:
            self._tried(name, lambda: self._objects.delete(name))
        except NotFoundError:
            pass  # gone already, which is what was wanted

    def sync(self) -> None:
        """What a store has acknowledged is durable."""

    def clean(self) -> int:
        return 0

    def close(self) -> None:
        """Connections end with the last reference."""

    def _tried(self, name: str, call: Callable[[], Result]) -> Result:
        """Do it, again and again while the failure is one that may pass."""
        end = time.monotonic() + self.patience
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return call()
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.NotSupportedError):
                raise
            except (FileNotFoundError, obstore.exceptions.NotFoundError) as error:
                raise NotFoundError(f"{name} is not in the repository {self.url}") from error
            except (PermissionError, obstore.exceptions.PermissionDeniedError,
                    obstore.exceptions.UnauthenticatedError) as error:
                raise PermissionDeniedError(f"{self.url} refuses access to {name}: {_first_line(error)}",
                                            hint="check the credentials in the environment") from error
            except (OSError, obstore.exceptions.BaseError) as error:
                if time.monotonic() + pause > end:
                    raise RepositoryError(f"{self.url} does not answer for {name}: {_first_line(error)}",
                                          hint="nothing in the repository is lost; try again later") from error
                self._tell(pause, error)
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _tell(self, pause: float, error: Exception) -> None:
        """Who waits in front of a command shall know what for; short failures are nobody's concern."""
        if pause >= TOLD_FROM_SECONDS and not self._told:
            self._told = True
            logger.warning("%s does not answer and is tried again for %d minutes: %s", self.url,
                           self.patience // 60, _first_line(error))


class _Listing:
    """The pages of a listing. After a failure the next page starts behind the last name that came."""

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects = objects
        self._prefix = prefix or None
        self._last: str | None = None
        self._pages: Iterator[Sequence[Any]] | None = None

    def page(self) -> Sequence[Any]:
        """The next page, empty at the end."""
        if self._pages is None:
            self._pages = iter(self._objects.list(self._prefix, offset=self._last, chunk_size=1000))
        try:
            page = next(self._pages, [])
        except BaseException:
            self._pages = None
            raise
        if page:
            self._last = max(meta["path"] for meta in page)
        return page


def _connect(url: str) -> ObjectStore:
    if url.startswith("memory://"):
        return _memory.setdefault(url, MemoryStore())
    client: ClientConfig = {"timeout": timedelta(seconds=REQUEST_SECONDS)}
    config: dict[str, Any] = {}
    if url.startswith("az"):
        config = {ours: os.environ[name] for name, ours in AZURE_NAMES.items() if name in os.environ}
    if url.startswith("s3"):
        config = awsprofile.settings(os.environ)
        if awsprofile.endpoint(os.environ, config).startswith("http://"):
            client["allow_http"] = True  # who writes http:// there means it
    try:
        connect: Callable[..., ObjectStore] = from_url  # its type has an overload per store, and ours is of any
        return connect(url, config=config, client_options=client, retry_config=RETRIES)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise UsageError(f"{url!r} cannot be used: {_first_line(error)}",
                         hint="write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, and set the "
                              "store's account in the environment") from error


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
