# SPDX-License-Identifier: Apache-2.0
"""The daemon's connection to a worker keeps answers and requests together, and says what went wrong."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stasis.daemon.channel import Channel, WorkerGone
from stasis.errors import BusyError, ExitCode, StasisError, StorageError

Serve = Callable[[socket.socket], None]


@pytest.fixture
def serve(short_dir: Path) -> Iterator[Callable[[Serve], Path]]:
    """Listen on a control socket and handle each connection in a thread of its own."""
    path = short_dir / "w.ctl"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(4)
    threads: list[threading.Thread] = []

    def accept(handler: Serve) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=_handle, args=(handler, peer)))
            threads[-1].start()

    def start(handler: Serve) -> Path:
        threads.append(threading.Thread(target=accept, args=(handler,)))
        threads[-1].start()
        return path

    yield start
    listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(30)
    listener.close()


def _handle(handler: Serve, peer: socket.socket) -> None:
    with peer:
        handler(peer)


def _echo(peer: socket.socket) -> None:
    while data := peer.recv(65536):
        peer.send(json.dumps({"ok": True, "was": json.loads(data)}).encode())


def test_a_call_is_answered(serve: Callable[[Serve], Path]) -> None:
    with Channel.connect(serve(_echo), "disk") as channel:
        assert channel.call("mark", ranges=[[0, 1]])["was"] == {"op": "mark", "ranges": [[0, 1]]}


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EBUSY, BusyError), (errno.ENOSPC, StorageError), (errno.EIO, StasisError)]
)
def test_a_refusal_keeps_its_errno_and_its_words(
    serve: Callable[[Serve], Path], number: int, kind: type[StasisError]
) -> None:
    def refuse(peer: socket.socket) -> None:
        peer.recv(65536)
        peer.send(json.dumps({"ok": False, "errno": number, "message": "not now"}).encode())

    with Channel.connect(serve(refuse), "disk") as channel, pytest.raises(kind, match=r"disk.*not now") as raised:
        channel.call("prepare")
    assert raised.value.errno == number


def test_a_worker_that_ends_is_told_as_such(serve: Callable[[Serve], Path]) -> None:
    with Channel.connect(serve(lambda peer: None), "disk") as channel, pytest.raises(WorkerGone) as raised:
        channel.call("info")
    assert raised.value.exit_code == ExitCode.DAEMON


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(serve: Callable[[Serve], Path]) -> None:
    late = threading.Event()

    def slow(peer: socket.socket) -> None:
        try:
            while data := peer.recv(65536):
                op = json.loads(data)["op"]
                if op == "sync":
                    late.wait(30)
                peer.send(json.dumps({"ok": True, "op": op}).encode())
        except OSError:
            return  # the channel was given up

    with Channel.connect(serve(slow), "disk", timeout=0.2) as channel:
        with pytest.raises(WorkerGone) as raised:
            channel.call("sync")
        assert raised.value.errno == errno.ETIMEDOUT
        late.set()
        assert channel.call("info")["op"] == "info"
        assert channel.call("hello")["op"] == "hello"


def test_descriptors_come_by_name(serve: Callable[[Serve], Path], tmp_path: Path) -> None:
    (tmp_path / "origin").write_text("origin")

    def lend(peer: socket.socket) -> None:
        peer.recv(65536)
        with (tmp_path / "origin").open() as file:
            answer = json.dumps({"ok": True, "descriptors": ["origin"]}).encode()
            socket.send_fds(peer, [answer], [file.fileno()])

    with Channel.connect(serve(lend), "disk") as channel:
        (fd,) = channel.descriptors().values()
    assert os.pread(fd, 10, 0) == b"origin"
    assert not os.get_inheritable(fd)
    os.close(fd)
