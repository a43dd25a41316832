# SPDX-License-Identifier: Apache-2.0
"""A worker process: its control protocol, what it survives, and what copy-on-write costs."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from errno import EBUSY, EINVAL, EIO, ENOENT, ENOTTY
from pathlib import Path

import pytest

from stasis.nbd.client import Client
from tests.block.engine import is_corrupted, pread, pwrite_many
from tests.block.workers import SNAPSHOT, WorkerProcess

SIZE = (8 << 20) + 1234
MIB = 1 << 20

Start = Callable[..., WorkerProcess]


@pytest.fixture
def image_file(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "origin"
    path.write_bytes(random.Random(seed).randbytes(SIZE))
    return path


@pytest.fixture
def worker(short_dir: Path, image_file: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(short_dir, image_file) as process:
        yield process


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# -- control protocol ---------------------------------------------------------------------------------


def test_hello_tells_who_it_is(worker: WorkerProcess) -> None:
    answer = worker.control.do("hello")
    assert (answer["pid"], answer["name"], answer["size"]) == (worker.process.pid, "x", SIZE)
    assert (answer["snapshot"], answer["snapshot_state"], answer["change_number"]) == (None, None, 0)
    worker.prepare()
    assert worker.control.do("hello")["snapshot_state"] == "prepared"


def test_unknown_requests_are_enotty(worker: WorkerProcess) -> None:
    worker.control.refused(ENOTTY, "nonsense")
    worker.control.sock.send(b"no json")
    assert worker.control.receive()[0]["errno"] == ENOTTY
    worker.control.sock.send(b"[1]")
    assert worker.control.receive()[0]["errno"] == ENOTTY


def test_requests_that_lack_something_are_refused(worker: WorkerProcess) -> None:
    before = len(os.listdir(f"/proc/{worker.process.pid}/fd"))
    worker.control.refused(EINVAL, "prepare")
    worker.control.refused(EINVAL, "prepare", [worker.origin.fd])
    worker.control.refused(EINVAL, "prepare", [worker.origin.fd], snapshot=SNAPSHOT)
    worker.control.refused(ENOENT, "drop", snapshot="another")
    worker.control.refused(EINVAL, "mark")
    worker.control.refused(EINVAL, "hold")
    assert len(os.listdir(f"/proc/{worker.process.pid}/fd")) == before


def test_marks_are_all_checked_before_any_is_applied(worker: WorkerProcess) -> None:
    for wrong in ([-1, 10], [0, 0], [SIZE - 1, 2], [SIZE, 1]):
        worker.control.refused(EINVAL, "mark", ranges=[[0, 10], wrong])
    assert worker.changed(0) == []
    worker.control.do("mark", ranges=[[70000, 1], [SIZE - 1, 1]])
    assert worker.changed(0) == [(65536, 65536), (SIZE >> 16 << 16, SIZE % 65536)]


def test_a_take_raises_the_change_number(worker: WorkerProcess) -> None:
    assert worker.take()["change_number"] == 1
    assert worker.control.do("hello")["snapshot"] == SNAPSHOT
    assert worker.control.do("hello")["snapshot_state"] == "taken"
    with worker.client() as client:
        client.pwrite(0, b"new")
    assert worker.changed(1) == [(0, 65536)]
    worker.control.refused(EBUSY, "prepare", [worker.origin.fd], snapshot="b", table="t", storage="s", chunk_shift=16)
    worker.drop()
    assert worker.take()["change_number"] == 2
    assert worker.changed(2) == []


def test_switch_twice_and_release_first_are_refused(worker: WorkerProcess) -> None:
    worker.prepare()
    worker.control.do("hold", timeout_ms=5000)
    worker.control.refused(EINVAL, "release")
    worker.control.refused(EINVAL, "info")
    worker.control.do("switch")
    assert not worker.control.ask("switch")["ok"]
    worker.control.do("release")


def test_nothing_is_served_while_held(worker: WorkerProcess) -> None:
    worker.prepare()
    with worker.client() as client:
        worker.control.do("hold", timeout_ms=20000)
        writer = threading.Thread(target=client.pwrite, args=(0, b"later"))
        writer.start()
        worker.control.do("switch")
        with worker.image() as image:
            assert pread(image, 0, 5) != b"later"
            held = pread(image, 0, SIZE)
            assert worker.changed(1) == []
            worker.control.do("release")
            writer.join(30)
            assert client.pread(0, 5) == b"later"
            assert pread(image, 0, SIZE) == held


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("how", ["abort", "timeout", "end"])
def test_a_take_that_fails_leaves_nothing(worker: WorkerProcess, how: str, switched: bool) -> None:
    with worker.client() as client:
        client.pwrite(0, b"first")
        worker.prepare()
        other = worker.connection()
        other.do("hold", timeout_ms=200 if how == "timeout" else 20000)
        if switched:
            assert other.do("switch")["change_number"] == 1
        if how == "abort":
            other.do("abort")
        elif how == "end":
            other.close()
        client.pwrite(1 << 20, b"second")
    answer = worker.control.do("hello")
    assert (answer["snapshot"], answer["snapshot_state"], answer["change_number"]) == (None, None, 0)
    assert worker.changed(0) == [(0, 65536), (MIB, 65536)]
    assert worker.take()["change_number"] == 1


def test_descriptors_are_handed_over(worker: WorkerProcess) -> None:
    worker.take()
    worker.control.send("descriptors")
    answer, fds = worker.control.receive()
    assert answer["descriptors"] == ["origin", "listen", "storage"]
    assert worker.storage is not None
    mine = (worker.origin.fd, worker.listener.fileno(), worker.storage.fd)
    try:
        assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(fd).st_ino for fd in mine]
    finally:
        for fd in fds:
            os.close(fd)


def test_sockets_are_private(worker: WorkerProcess) -> None:
    for suffix in ("ctl", "inner"):
        assert (worker.directory / f"x.{suffix}").stat().st_mode & 0o777 == 0o600


# -- the end and the next start -----------------------------------------------------------------------


def test_stop_marks_the_map_clean(worker: WorkerProcess) -> None:
    with worker.client() as client:
        client.pwrite(5 * MIB, b"x")
    generation = worker.control.do("hello")["generation"]
    with worker.map() as changes:
        assert not changes.is_clean
    worker.stop()
    assert worker.process.returncode == 0
    with worker.map() as changes:
        assert changes.is_clean
    worker.start(continuity=False)
    assert worker.control.do("hello")["generation"] == generation
    assert worker.control.do("info")["opening"] == {"fresh": False, "reason": ""}
    assert worker.changed(0) == [(5 * MIB, 65536)]


def test_a_file_written_while_detached_begins_a_generation(worker: WorkerProcess, image_file: Path) -> None:
    generation = worker.control.do("hello")["generation"]
    worker.stop()
    with image_file.open("r+b") as file:
        file.write(b"changed by another program")
    worker.start(continuity=False)
    opening = worker.control.do("info")["opening"]
    assert opening["fresh"]
    assert "while it was not attached" in opening["reason"]
    assert worker.control.do("hello")["generation"] != generation


def test_death_under_load_loses_nothing(worker: WorkerProcess, seed: int) -> None:
    """Killed again and again: flushed writes are there, the image stays right, the map covers every change."""
    source = random.Random(seed)
    rounds = 40 if os.environ.get("STASIS_HYPOTHESIS_PROFILE") == "thorough" else 5
    load = Load(worker, source)
    before = load.read()
    worker.take()
    load.start_epoch(before)
    for _ in range(rounds):
        load.until_killed(source.uniform(0.02, 0.3))
        worker.start(resume=True)
        assert worker.control.do("hello")["snapshot"] == SNAPSHOT
        load.check()
        with worker.image() as image:
            assert pread(image, 0, SIZE) == before
            assert not is_corrupted(image)


def test_image_stays_right_while_the_origin_is_written(worker: WorkerProcess, seed: int) -> None:
    """Read in another process than the one that writes, with no lock between them."""
    source = random.Random(seed)
    before = Load(worker, source).read()
    worker.take()
    ended = threading.Event()

    def overwrite() -> None:
        sizes = random.Random(seed + 1)
        with worker.client() as client:
            while not ended.is_set():
                client.write_many([(sizes.randrange(SIZE - 70000), os.urandom(sizes.choice([1, 4096, 70000])))] * 2)

    writer = threading.Thread(target=overwrite)
    writer.start()
    try:
        with worker.image() as image:
            for _ in range(400):
                start = source.randrange(SIZE)
                length = min(source.choice([100, 4096, 300000]), SIZE - start)
                assert pread(image, start, length) == before[start : start + length]
    finally:
        ended.set()
        writer.join()
    assert worker.snapshot()["error_code"] == 0


class Load:
    """Writes blocks that hold their own count, flushes now and then, and knows what must be there."""

    def __init__(self, worker: WorkerProcess, source: random.Random) -> None:
        self.worker, self.source = worker, source
        self.flushed: dict[int, int] = {}
        self.issued: dict[int, int] = {}
        self.answered: dict[int, int] = {}
        self.count = 0
        self.before = b""

    def read(self) -> bytes:
        with self.worker.client() as client:
            return client.pread(0, SIZE)

    def start_epoch(self, before: bytes) -> None:
        self.before = before

    def until_killed(self, seconds: float) -> None:
        killer = threading.Timer(seconds, self.worker.kill)
        killer.start()
        try:
            client = self.worker.client()
            while True:
                self._write_some(client)
        except (OSError, EOFError):
            pass  # that is how the client notices
        finally:
            killer.join()
            client.close()

    def _write_some(self, client: Client) -> None:
        writes, counts = [], {}
        for block in self.source.sample(range(SIZE // 4096), 16):
            self.count += 1
            self.issued[block] = counts[block] = self.count
            writes.append((block * 4096, self.count.to_bytes(8, "big") * 512))
        client.write_many(writes)
        self.answered.update(counts)
        if self.source.random() < 0.3:
            client.flush()
            self.flushed.update(self.answered)

    def check(self) -> None:
        now = self.read()
        for block, count in self.flushed.items():
            found = int.from_bytes(now[block * 4096 : block * 4096 + 8], "big")
            assert count <= found <= self.issued[block]
        reported = {
            block
            for offset, length in self.worker.changed(1)
            for block in range(offset // 4096, -(-(offset + length) // 4096))
        }
        differing = {
            block
            for block in range(-(-SIZE // 4096))
            if now[block * 4096 : (block + 1) * 4096] != self.before[block * 4096 : (block + 1) * 4096]
        }
        assert differing <= reported


# -- events -------------------------------------------------------------------------------------------


def test_growth_limit_and_overflow_are_events(worker: WorkerProcess) -> None:
    watcher = worker.connection()
    watcher.do("subscribe")
    worker.take(limit=4 * MIB, portion=2 * MIB)
    new = random.Random(1).randbytes(SIZE)
    with worker.client() as client, worker.image() as image:
        client.pwrite(0, new)
        assert client.pread(0, SIZE) == new
        assert is_corrupted(image)
        with pytest.raises(OSError) as caught:
            pwrite_many(image, [(0, b"x")])
        assert caught.value.errno == EIO
    events = []
    while not events or events[-1]["event"] != "corrupted":
        events.append(watcher.receive()[0])
    kinds = [event["event"] for event in events]
    assert kinds.count("no_space") == 1
    assert kinds[0] == "low_space"
    assert events[-1]["error_code"] == -28
    assert {(event["snapshot"], event["device"]) for event in events} == {(SNAPSHOT, "x")}
    assert worker.snapshot()["error_code"] == -28
    worker.drop()
    assert worker.take()["change_number"] == 2


def test_a_resize_is_a_new_generation(worker: WorkerProcess, image_file: Path) -> None:
    watcher = worker.connection()
    watcher.do("subscribe")
    generation = worker.control.do("hello")["generation"]
    worker.take()
    with worker.image() as image:
        held = pread(image, 0, SIZE)
        os.truncate(image_file, SIZE + 5 * MIB)
        event = watcher.receive()[0]
        assert event["event"] == "generation"
        assert str(SIZE + 5 * MIB) in event["reason"]
        assert worker.control.do("hello")["generation"] != generation
        with worker.client() as client:
            assert client.size == SIZE + 5 * MIB
            client.pwrite(SIZE - 10, b"over the former end")
            client.pwrite(SIZE + 4 * MIB, b"far behind it")
        assert pread(image, 0, SIZE) == held
        os.truncate(image_file, SIZE // 2)
        kinds: set[str] = set()
        while not kinds >= {"generation", "corrupted"}:
            kinds.add(watcher.receive()[0]["event"])
        assert is_corrupted(image)


def test_an_image_of_a_grown_device_is_written_to_its_end(worker: WorkerProcess, image_file: Path) -> None:
    os.truncate(image_file, SIZE + MIB)
    eventually(lambda: worker.control.do("hello")["size"] == SIZE + MIB, "the worker does not see the new size")
    worker.take()
    with worker.image() as image:
        pwrite_many(image, [(SIZE + MIB - 3, b"end")])
        assert pread(image, SIZE + MIB - 4, 4) == b"\0end"


def test_a_resize_between_prepare_and_hold_ends_the_take(worker: WorkerProcess, image_file: Path) -> None:
    worker.prepare()
    os.truncate(image_file, SIZE + MIB)
    eventually(lambda: worker.control.do("hello")["snapshot"] is None, "the snapshot is still prepared")
    worker.control.refused(EINVAL, "hold")
    assert worker.take()["change_number"] == 1


# -- cost ---------------------------------------------------------------------------------------------


def test_small_random_writes_copy_what_they_overwrite(worker: WorkerProcess, seed: int) -> None:
    """At 4 KiB not more than 1.1 bytes are read and stored per byte written; the second time nothing."""
    blocks = random.Random(seed).sample(range(SIZE // 4096), 1000)
    writes = [(block * 4096, os.urandom(4096)) for block in blocks]
    worker.take()
    with worker.client() as client:
        client.write_many(writes)
        first = worker.snapshot()
        client.write_many(writes)
    assert first["read"] <= 1.1 * 4096 * len(blocks)
    assert first["stored"] <= 1.1 * 4096 * len(blocks)
    assert first["stored"] == 4096 * len(blocks)
    assert worker.snapshot()["stored"] == first["stored"]
    assert worker.snapshot()["read"] == first["read"]


def test_discards_of_holes_and_of_copied_space_store_nothing(short_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        file.write(b"x" * MIB)
    with WorkerProcess(short_dir, path) as worker, worker.client() as client:
        worker.take()
        client.trim(MIB, 63 * MIB)
        client.write_zeroes(32 * MIB, 16 * MIB, punch=False)
        assert (worker.snapshot()["read"], worker.snapshot()["stored"]) == (0, 0)
        client.trim(0, 64 * MIB)
        assert worker.snapshot()["stored"] == MIB
        client.write_zeroes(0, 2 * MIB)
        client.trim(0, 64 * MIB)
        assert worker.snapshot()["stored"] == MIB
        with worker.image() as image:
            assert pread(image, 0, 2 * MIB) == b"x" * MIB + bytes(MIB)


def test_tracking_may_be_left_out(short_dir: Path, image_file: Path) -> None:
    with WorkerProcess(short_dir, image_file, tracking=False) as worker:
        assert worker.take()["generation"] is None
        with worker.image() as image, worker.client() as client:
            before = client.pread(0, 10)
            client.pwrite(0, b"0123456789")
            assert pread(image, 0, 10) == before
        worker.control.refused(1, "mark", ranges=[[0, 1]])


def test_dropping_while_the_storage_grows(worker: WorkerProcess) -> None:
    """Taken, overwritten and dropped at once, many times: the worker goes on."""
    with worker.client() as client:
        for step in range(20):
            worker.take(storage=str(worker.state), limit=64 * MIB, portion=2 * MIB)
            client.pwrite(0, bytes([step]) * (4 * MIB))
            worker.drop()
        assert client.pread(0, 4) == bytes([19]) * 4
    with worker.map() as changes:
        assert changes.change_number == 20
