# SPDX-License-Identifier: Apache-2.0
"""Many slow calls at once: as many threads as the store is worth, a bounded number of calls ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")

CALLS_AHEAD = 4  # per thread


def in_threads(call: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The results of `call` for each item, in their order. An exception of a call is raised in its place."""
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="keep") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(call, item))
                if len(ahead) >= threads * CALLS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
