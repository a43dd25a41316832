# SPDX-License-Identifier: Apache-2.0
"""How long commands show how far they are: a bar on a terminal, JSON lines with --json, and a line at SIGUSR1.

A thread looks at the job's counters now and then, so that nothing is printed more often than somebody can read and a
job that waits still shows the time. Elsewhere (cron, a unit) nothing is printed but results and errors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from stasis.cli.output import print_error
from stasis.errors import StasisError

if TYPE_CHECKING:
    from stasis.backup.progress import Progress

__all__ = ["Reporter", "report"]

LINE_SECONDS = 1.0
BAR_SECONDS = 0.2


class Reporter:
    """What a command tells with. `progress` goes to the job; `finish` ends with the summary."""

    def __init__(self, lines: TextIO | None) -> None:
        from stasis.backup.progress import Progress

        self._lines = lines
        self._writing = threading.Lock()
        self.display = contextlib.ExitStack()
        self.progress: Progress = Progress(on_error=self.error)

    @property
    def as_json(self) -> bool:
        """Whether JSON lines are written."""
        return self._lines is not None

    def status(self) -> None:
        """Write a status line."""
        self._write(self.progress.status().as_dict())

    def error(self, error: StasisError) -> None:
        """Tell of an error at once: a JSON line, or a sentence on standard error."""
        if self._lines is None:
            _clear_line()
            print_error(error, as_json=False)
        self._write({"message_type": "error", **error.as_dict()})

    def say(self, text: str) -> None:
        """Print a line on the way, for people only."""
        if self._lines is None:
            _clear_line()
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning on standard error, for people only; with --json it belongs into the summary."""
        if self._lines is None:
            _clear_line()
            print(f"stasis: {text}", file=sys.stderr)

    def finish(self, fields: Mapping[str, Any], text: str = "") -> None:
        """The result: with --json a last status and the summary, otherwise the text for people."""
        self.display.close()  # a bar that still stands would share the line with the text
        if self._lines is None:
            if text:
                print(text, flush=True)
            return
        self.status()
        self._write({**fields, "message_type": "summary"})

    def _write(self, fields: Mapping[str, Any]) -> None:
        if self._lines is not None:
            with self._writing:
                print(json.dumps(fields), file=self._lines, flush=True)


@contextlib.contextmanager
def report(arguments: argparse.Namespace, *, lines: TextIO | None = None) -> Iterator[Reporter]:
    """Show the progress of what happens inside. SIGTERM interrupts it as Ctrl-C does, so that locks are given back.

    `lines`: where JSON lines go, standard output unless a command writes its data there. An error that ends the
    command is told in a line too, and again by `main`.
    """
    from stasis.daemon.signals import interrupted_by_sigterm

    reporter = Reporter((lines or sys.stdout) if arguments.json else None)
    with interrupted_by_sigterm(), _answer_signal(reporter.progress), reporter.display:
        reporter.display.enter_context(_shown(reporter))
        try:
            yield reporter
        except StasisError as error:
            if reporter.as_json:
                reporter.error(error)
            raise


@contextlib.contextmanager
def _answer_signal(progress: Progress) -> Iterator[None]:
    """SIGUSR1 prints a status line. Only the main thread can set this up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def answer(number: int, frame: FrameType | None) -> None:
        # Not print: the signal may have come in the middle of one, and a buffered stream must not be entered twice.
        start = "\r\x1b[K" if os.isatty(2) else ""
        os.write(2, f"{start}stasis: {progress.status()}\n".encode())

    before = signal.signal(signal.SIGUSR1, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _clear_line() -> None:
    """Take away the bar, which comes back with its next update."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _shown(reporter: Reporter) -> Iterator[None]:
    if reporter.as_json:
        with _every(LINE_SECONDS, reporter.status):
            yield
    elif sys.stderr.isatty():
        with _bar(reporter.progress) as draw, _every(BAR_SECONDS, draw):
            yield
    else:
        yield


@contextlib.contextmanager
def _every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more; the command itself meets that too
            while not over.wait(seconds):
                call()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _bar(progress: Progress) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr) as bar:

        def draw() -> None:
            status = progress.status()
            if status.phase != bar.desc:
                bar.reset()
                bar.desc = status.phase
            bar.total, bar.n = status.bytes_total, status.bytes_done
            bar.refresh()

        yield draw
