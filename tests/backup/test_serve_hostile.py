# SPDX-License-Identifier: Apache-2.0
"""Clients that send anything: a served backup stays what it is, for whoever reads it beside them."""

from __future__ import annotations

import random
import resource
import sys
from pathlib import Path

import pytest

from stasis.backup.serve.cache import ChunkCache
from stasis.backup.serve.export import BackupExport
from stasis.backup.serve.overlay import OverlayExport, Scratch
from stasis.nbd import protocol as p
from tests.backup.fakes import CHUNK, FakeIndex, FakeReader, FakeStore, image
from tests.nbd import fuzz
from tests.nbd.exports import DIRTY
from tests.nbd.wire import Chunk, Pair, option, parse_replies, request, try_receive, try_send

SIZE = 1 << 20  # what the fuzzer aims at
SLOTS = 8


class Target:
    """One backup, served to the fuzzer with scratch space and to an honest client without."""

    def __init__(self, directory: Path, seed: int) -> None:
        store = FakeStore()
        self.data = image(SIZE, seed)
        index, older = FakeIndex(store, self.data), FakeIndex(store, image(SIZE, seed + 1))
        store.damage(index.name(next(number for number in range(index.count) if any(index.name(number)))))
        self.cache = ChunkCache(lambda: FakeReader(store), CHUNK, limit=SLOTS * CHUNK)
        against = (DIRTY.removeprefix(p.QEMU_DIRTY_BITMAP), older)
        self.scratch = Scratch(str(directory), SIZE)
        attacked = OverlayExport(BackupExport("disk", index, self.cache, against=against), self.scratch)
        intact = FakeIndex(store, self.data[: SIZE // 2][::-1])
        self.expected = self.data[: SIZE // 2][::-1]
        self.pair = Pair(attacked, BackupExport("witness", intact, self.cache))
        self.pair.negotiate(option(p.NBD_OPT_STRUCTURED_REPLY), name="witness")

    def close(self) -> None:
        self.pair.close()
        self.scratch.close()
        self.cache.close()

    def attack(self, data: bytes, draw: random.Random) -> int:
        client = self.pair.connect()
        received = 0
        while data:
            sent = try_send(client, data[: draw.choice((28, 1000, 1 << 20))])
            data = data[sent:]
            self.pair.loop.run_once(0)
            received += len(try_receive(client))
        for _ in range(3):
            self.pair.loop.run_once(0)
            received += len(try_receive(client))
        client.close()
        for _ in range(1000):
            if self.pair.server.connections == 1:
                return received
            self.pair.loop.run_once(0)
        raise AssertionError("a connection outlived its client")

    def check_witness(self, draw: random.Random) -> None:
        offset = draw.randrange(len(self.expected) - 4096)
        answer = self.pair.exchange(request(p.NBD_CMD_READ, offset, 4096, cookie=7), turns=2)
        [chunk] = [reply for reply in parse_replies(answer) if isinstance(reply, Chunk)]
        assert chunk.payload[8:] == self.expected[offset : offset + 4096]


@pytest.mark.expects_errors("is altered")
def test_mutated_conversations_hurt_nobody(tmp_path: Path, seed: int) -> None:
    report = run(1000, seed, tmp_path)
    assert report["received"] > 1 << 20, "the mutations are too wild: nothing gets through"
    assert report["growth"] < 32 << 20


def run(inputs: int, seed: int, directory: Path) -> dict[str, int]:
    draw = random.Random(seed)
    target = Target(directory, seed)
    received = early = 0
    for number in range(inputs):
        if number == inputs // 4:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        received += target.attack(fuzz.mutate(draw, fuzz.conversation(draw)), draw)
        if number % 8 == 0:
            target.check_witness(draw)
    slots = len(target.cache._slots) + len(target.cache._free)
    target.close()
    assert slots <= SLOTS
    return {"received": received, "growth": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early) * 1024}


if __name__ == "__main__":
    print(run(int(sys.argv[1]), int(sys.argv[2]), Path("/var/tmp")))
