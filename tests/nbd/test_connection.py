# SPDX-License-Identifier: Apache-2.0
"""Clients that are slow, too many, silent or gone, and what they cost the server and the others."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest

from stasis.errors import BusyError, UsageError
from stasis.nbd import protocol as p
from stasis.nbd.client import Client
from stasis.nbd.listeners import tcp_listener, unix_listener
from tests.nbd.exports import MemoryExport
from tests.nbd.wire import CLIENT_FLAGS, Pair, ThreadedServer, go, option, parse_replies, request

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_client_that_takes_nothing_is_not_read_and_costs_one_turn(seed: int) -> None:
    export = MemoryExport(32 * MIB)
    export.data[:] = random.Random(seed).randbytes(32 * MIB)
    export.reports_holes = False
    with Pair(export) as pair:
        pair.negotiate()
        pair.client.setblocking(False)
        before = resident_bytes()
        lengths = dict.fromkeys(range(2000), MIB)
        message = b"".join(request(p.NBD_CMD_READ, (n % 32) * MIB, MIB, cookie=n) for n in lengths)
        pair.client.send(message)
        for _ in range(200):
            pair.loop.run_once(0)
        served = sum(count for name, count in export.calls if name == "read")
        assert served < 40, "the server went on reading for a client that takes nothing"
        assert resident_bytes() - before < 24 * MIB
        received = bytearray()
        while len(received) < 40 * (16 + MIB):
            pair.loop.run_once(0)
            try:
                received += pair.client.recv(1 << 20)
            except BlockingIOError:
                continue
        replies = parse_replies(bytes(received[: 40 * (16 + MIB)]), lengths)
        assert [reply.cookie for reply in replies] == list(range(40))
        assert all(r[2] == export.data[(n % 32) * MIB :][:MIB] for n, r in enumerate(replies))


def test_an_honest_client_is_served_beside_a_stuck_one() -> None:
    export = MemoryExport(8 * MIB)
    with Pair(export) as pair:
        pair.negotiate()
        pair.client.send(request(p.NBD_CMD_READ, 0, 8 * MIB) * 4)
        other = pair.connect()
        pair.exchange(CLIENT_FLAGS + option(p.NBD_OPT_EXPORT_NAME, b"disk"), other)
        assert len(parse_replies(pair.exchange(request(p.NBD_CMD_FLUSH, 0, 0) * 100, other))) == 100
        other.close()


def test_a_client_that_leaves_in_the_middle_is_forgotten() -> None:
    for message in (
        request(p.NBD_CMD_WRITE, 0, 4096, payload=bytes(100)),
        request(p.NBD_CMD_WRITE, 0, 8 * MIB, payload=bytes(3 * MIB)),
        request(p.NBD_CMD_READ, 0, 8 * MIB) * 3,
        request(p.NBD_CMD_TRIM, 0, 8 * MIB),
        b"\x25\x60",
    ):
        with Pair(MemoryExport(8 * MIB)) as pair:
            pair.negotiate()
            pair.client.send(message[:200_000])
            pair.loop.run_once(0)
            pair.client.close()
            for _ in range(300):
                pair.loop.run_once(0)
            assert pair.server.connections == 0


def test_negotiation_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with Pair(MemoryExport(), handshake_seconds=30) as pair:
        pair.exchange(CLIENT_FLAGS)
        monkeypatch.setattr(time, "monotonic", lambda: now + 29)
        pair.exchange(option(p.NBD_OPT_LIST))  # talking does not extend it
        assert not pair.dropped
        monkeypatch.setattr(time, "monotonic", lambda: now + 31)
        pair.loop.run_once(0)
        assert pair.dropped
        assert pair.server.connections == 0


def test_the_deadline_ends_with_the_negotiation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with Pair(MemoryExport(), handshake_seconds=30) as pair:
        pair.negotiate()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1000)
        assert len(parse_replies(pair.exchange(request(p.NBD_CMD_FLUSH, 0, 0)))) == 1


def test_one_client_too_many_is_turned_away() -> None:
    with Pair(MemoryExport(), max_connections=2) as pair:
        second, third = pair.connect(), pair.connect()
        assert third.recv(1) == b""
        assert pair.server.connections == 2
        second.close()
        pair.loop.run_once(0)
        fourth = pair.connect()
        assert fourth.recv(8) == b"NBDMAGIC"
        for sock in (third, fourth):
            sock.close()


def test_a_flood_of_options_is_answered_at_the_clients_pace() -> None:
    exports = [MemoryExport(4096, f"export-{number:04}" * 50) for number in range(60)]
    with Pair(*exports) as pair:
        before = resident_bytes()
        flood = CLIENT_FLAGS + option(p.NBD_OPT_LIST) * 60_000
        sent = 0
        for _ in range(400):
            pair.loop.run_once(0)
            try:
                sent += pair.client.send(flood[sent:])
            except BlockingIOError:
                continue
        assert sent < len(flood)
        assert resident_bytes() - before < 48 * MIB


def test_idle_clients_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair(MemoryExport(MIB)) as pair:
        pair.negotiate()
        pair.exchange(request(p.NBD_CMD_WRITE, 0, MIB, payload=bytes(MIB)))
        busy = resident_bytes()
        now = time.monotonic()
        for seconds in (6, 12):
            monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
            pair.loop.run_once(0)
        assert busy - resident_bytes() > MIB // 2
        assert len(parse_replies(pair.exchange(request(p.NBD_CMD_FLUSH, 0, 0)))) == 1


def test_closing_the_server_ends_its_clients() -> None:
    with Pair(MemoryExport()) as pair:
        pair.negotiate()
        pair.server.close()
        assert pair.client.recv(1) == b""
        assert pair.server.connections == 0


def test_many_clients_in_parallel(short_dir: Path) -> None:
    export = MemoryExport(16 * MIB)
    failures: list[str] = []

    def work(number: int, uri: str) -> None:
        draw = random.Random(number)
        base = number * MIB
        with Client.connect(uri) as client:
            for _ in range(30):
                offset, data = base + draw.randrange(MIB // 2), draw.randbytes(draw.randrange(1, MIB // 2))
                client.pwrite(offset, data)
                if client.pread(offset, len(data)) != data:
                    failures.append(f"client {number} at {offset}")

    with ThreadedServer(short_dir / "s", [export]) as server:
        threads = [threading.Thread(target=work, args=(number, server.uri())) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_multi_conn_flush_covers_all_connections() -> None:
    export = MemoryExport()
    with Pair(export) as pair:
        pair.negotiate()
        other = pair.connect()
        pair.exchange(CLIENT_FLAGS + go("disk"), other)
        pair.exchange(request(p.NBD_CMD_WRITE, 0, 512, payload=bytes(512)))
        pair.exchange(request(p.NBD_CMD_FLUSH, 0, 0), other)
        assert [name for name, _ in export.calls] == ["write", "flush"]
        other.close()


def test_unix_listener_replaces_only_what_is_dead(short_dir: Path) -> None:
    path = short_dir / "s"
    first = unix_listener(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BusyError):
        unix_listener(str(path))
    first.close()
    unix_listener(str(path)).close()
    path.unlink()
    path.write_text("a file")
    with pytest.raises(BusyError):
        unix_listener(str(path))
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        unix_listener("/tmp/" + "x" * 103)


def test_plain_tcp_is_for_loopback_only() -> None:
    tcp_listener("127.0.0.1", 0, encrypted=False).close()
    tcp_listener("::1", 0, encrypted=False).close()
    for host in ("0.0.0.0", ""):
        with pytest.raises(UsageError, match="TLS is not configured"):
            tcp_listener(host, 0, encrypted=False)


def test_the_listener_is_left_alone_while_descriptors_are_short(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short:
        """A listener whose accept fails once as it does at the limit of open files."""

        def __init__(self, listener: socket.socket) -> None:
            self.listener, self.failures, self.accepts = listener, 1, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.listener, name)

        def accept(self) -> object:
            self.accepts += 1
            if self.failures:
                self.failures -= 1
                raise OSError(24, "Too many open files")
            return self.listener.accept()

    with Pair(MemoryExport()) as pair:
        listener = Short(unix_listener(str(short_dir / "s")))
        pair.server.add_listener(listener)  # type: ignore[arg-type]
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(short_dir / "s"))
        for _ in range(50):
            pair.loop.run_once(0)
        assert (listener.accepts, pair.server.connections) == (1, 1)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        for _ in range(5):
            pair.loop.run_once(0)
        assert (listener.accepts, pair.server.connections) == (2, 2)
        client.close()
