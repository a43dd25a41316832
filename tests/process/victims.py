# SPDX-License-Identifier: Apache-2.0
"""Processes to look at, which prove afterwards that nothing happened to them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["COUNTING", "counting", "killed_while", "victim"]

COUNTING = """
import hashlib, sys, threading
def count(number):
    digest = b""
    while True:
        for step in range(1000):
            digest = hashlib.sha256(digest + step.to_bytes(4, "big")).digest()
        counted[number] += 1
        expected = known.setdefault(counted[number], digest)
        assert digest == expected, "the thread computed something else"
known, counted = {}, [0, 0, 0]
for number in range(2):
    threading.Thread(target=count, args=(number,), daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    print(min(counted[:2]), flush=True)
"""
"""Two threads that compute the same sequence and notice if one of them went wrong, and one that answers."""


@contextmanager
def victim(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready, in a session of its own; ended with the block."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@contextmanager
def counting() -> Iterator[subprocess.Popen[str]]:
    """The counting process."""
    with victim(sys.executable, "-c", COUNTING) as process:
        yield process


def progress(process: subprocess.Popen[str]) -> int:
    """How far a counting process is; it must be alive and answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def killed_while(draw: random.Random, longest: float, *words: object) -> None:
    """Start a `stasis process` command, and kill it after up to `longest` seconds if it has not ended by then."""
    command = [sys.executable, "-m", "stasis", "process", *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            process.wait(timeout=draw.uniform(0.05, longest))
        except subprocess.TimeoutExpired:
            process.kill()
