# SPDX-License-Identifier: Apache-2.0
"""A mutating fuzzer of the NBD server.

Valid conversations are cut, flipped, repeated, spliced and sent in pieces of any size to a server in this process.
Whatever comes, no exception may leave the event loop, the connection must end with its client, memory must not grow,
and an honest client beside it must get its own data.

    python -m tests.nbd.fuzz 100000 [SEED]
"""

from __future__ import annotations

import errno
import json
import random
import resource
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass

from stasis.nbd import protocol as p
from tests.nbd.exports import DIRTY, MemoryExport
from tests.nbd.wire import (
    CLIENT_FLAGS,
    Chunk,
    Pair,
    contexts,
    go,
    option,
    parse_replies,
    request,
    try_receive,
    try_send,
)

__all__ = ["Report", "run"]

_VICTIM_SIZE = 1 << 20
_WITNESS_SIZE = 64 << 10
_WITNESS_EVERY = 16
_TURNS_TO_END = 1000
"""The server may finish what it has received from a client that left; it is bounded by its input buffer."""
_INTERESTING = (0, 1, 2, 7, 8, 27, 28, 255, 4095, 4096, 65535, 65536, 1 << 20, (1 << 20) + 1, 1 << 25, (1 << 31) - 1,
                1 << 31, (1 << 32) - 1)  # fmt: skip
_MAGICS = (p.NBD_OPTION_MAGIC.to_bytes(8, "big"), p.NBD_REQUEST_MAGIC.to_bytes(4, "big"))


@dataclass
class Report:
    """What a run did."""

    inputs: int
    seed: int
    seconds: float
    bytes_sent: int
    bytes_received: int
    witness_checks: int
    dropped: int
    """Inputs that the server answered by disconnecting."""
    memory_growth: int
    """Growth of this process's peak memory after the first tenth, in bytes."""


def run(inputs: int, seed: int) -> Report:
    """Send so many mutated conversations. Raises AssertionError, with the seed and the number of the input, when a
    promise is broken; whatever leaves the server's event loop is raised as it is, with the same note."""
    fuzzer = _Fuzzer(random.Random(seed))
    started = time.monotonic()
    early = 0
    try:
        for number in range(inputs):
            if number == inputs // 10:
                early = _peak_memory()
            try:
                fuzzer.one_input(number)
            except Exception as error:
                error.add_note(f"fuzz input {number} of seed {seed}")
                raise
    finally:
        fuzzer.close()
    return Report(inputs, seed, time.monotonic() - started, fuzzer.sent, fuzzer.received, fuzzer.checks, fuzzer.dropped,
                  _peak_memory() - early)  # fmt: skip


class _Fuzzer:
    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        witness = MemoryExport(_WITNESS_SIZE, "witness")
        self._pattern = random_.randbytes(_WITNESS_SIZE)
        witness.data[:] = self._pattern
        witness.holes = bytearray(len(witness.holes))
        self._victim = MemoryExport(_VICTIM_SIZE, "disk")
        self._pair = Pair(self._victim, witness)
        self._pair.negotiate(option(p.NBD_OPT_STRUCTURED_REPLY), name="witness")
        self.sent = self.received = self.checks = self.dropped = 0

    def one_input(self, number: int) -> None:
        data = mutate(self._random, conversation(self._random))
        self._change_victim()
        client = self._pair.connect()
        try:
            self._converse(client, data)
            if number % _WITNESS_EVERY == 0:
                self._check_witness()
        finally:
            client.close()
        for _ in range(_TURNS_TO_END):
            if self._pair.server.connections == 1:
                return
            self._pair.loop.run_once(0)
        raise AssertionError("a connection outlived its client")

    def _change_victim(self) -> None:
        """Another kind of disk for every input: alignment, block size, holes, faults."""
        self._victim.calls.clear()
        self._victim.alignment = self._random.choice((1, 1, 512, 4096))
        self._victim.minimum_block = self._random.choice((1, 1, 512))
        self._victim.reports_holes = self._random.random() < 0.5
        self._victim.read_only = self._random.random() < 0.1
        faults = self._random.choices(range(-1, _VICTIM_SIZE), k=self._random.choice((0, 0, 3)))
        self._victim.faults = dict.fromkeys(faults, errno.EIO)

    def close(self) -> None:
        self._pair.close()

    def _converse(self, client: socket.socket, data: bytes) -> None:
        """Send in pieces, with a turn of the loop after each, and take what comes."""
        while data:
            size = self._random.choice((1, 16, 28, 100, 1000, 1 << 20))
            sent = try_send(client, data[:size])
            self.sent += sent
            data = data[sent:]
            self._pair.loop.run_once(0)
            if self._random.random() < 0.5:  # else let replies pile up
                self.received += len(try_receive(client))
        for _ in range(3):
            self._pair.loop.run_once(0)
            self.received += len(try_receive(client))
        self.dropped += self._pair.server.connections == 1

    def _check_witness(self) -> None:
        offset = self._random.randrange(_WITNESS_SIZE - 4096)
        answer = self._pair.exchange(request(p.NBD_CMD_READ, offset, 4096, cookie=77), turns=2)
        chunks = [reply for reply in parse_replies(answer) if isinstance(reply, Chunk)]
        assert [chunk.cookie for chunk in chunks] == [77], "the honest client got no answer"
        assert chunks[0].payload[8:] == self._pattern[offset : offset + 4096], "the honest client got wrong data"
        self.checks += 1


def conversation(random_: random.Random) -> bytes:
    """A valid one: some options, then some requests."""
    structured = random_.random() < 0.7
    parts = [CLIENT_FLAGS]
    if structured:
        parts.append(option(p.NBD_OPT_STRUCTURED_REPLY))
    parts += random_.choices(_OPTIONS, k=random_.randrange(4))
    if structured:
        parts.append(contexts("disk", p.BASE_ALLOCATION, DIRTY))
    parts.append(random_.choice((go("disk", p.NBD_INFO_BLOCK_SIZE), option(p.NBD_OPT_EXPORT_NAME, b"disk"))))
    parts += [_random_request(random_) for _ in range(random_.randrange(12))]
    return b"".join(parts)


_OPTIONS = (
    option(p.NBD_OPT_LIST),
    option(p.NBD_OPT_STARTTLS),
    option(11),
    go("disk", p.NBD_INFO_NAME, p.NBD_INFO_DESCRIPTION, number=p.NBD_OPT_INFO),
    go("nothing", number=p.NBD_OPT_INFO),
    contexts("disk", number=p.NBD_OPT_LIST_META_CONTEXT),
    contexts("disk", "base:", "qemu:", number=p.NBD_OPT_LIST_META_CONTEXT),
    contexts("witness", p.BASE_ALLOCATION),
)


def _random_request(random_: random.Random) -> bytes:
    kind = random_.randrange(9)
    length = random_.choice((1, 512, 4096, 65536, 300_000))
    offset = random_.randrange(0, _VICTIM_SIZE, 512)
    flags = random_.choice((0, 0, 0, 1, 2, 4, 8, 16))
    payload = bytes(length) if kind == p.NBD_CMD_WRITE else b""
    if kind == p.NBD_CMD_FLUSH:
        offset = length = 0
    return request(kind, offset, length, flags=flags, cookie=random_.getrandbits(64), payload=payload)


def mutate(random_: random.Random, data: bytes) -> bytes:
    """Up to six mutations; one input in ten stays valid."""
    if random_.random() < 0.1:
        return data
    mutable = bytearray(data)
    for _ in range(random_.randrange(1, 7)):
        if mutable:
            random_.choice(_MUTATIONS)(random_, mutable)
    return bytes(mutable)


def _flip(random_: random.Random, data: bytearray) -> None:
    data[_position(random_, data)] ^= 1 << random_.randrange(8)


def _number(random_: random.Random, data: bytearray) -> None:
    """An interesting number over one that is there."""
    code = random_.choice((">H", ">I", ">Q"))
    value = random_.choice(_INTERESTING) & ((1 << 8 * struct.calcsize(code)) - 1)
    position = _position(random_, data)
    data[position : position + struct.calcsize(code)] = struct.pack(code, value)


def _cut(random_: random.Random, data: bytearray) -> None:
    start = _position(random_, data)
    del data[start : start + random_.choice((1, 4, 28, len(data)))]


def _repeat(random_: random.Random, data: bytearray) -> None:
    start = _position(random_, data)
    data[start:start] = data[start : start + random_.choice((1, 16, 28, 200))]


def _insert(random_: random.Random, data: bytearray) -> None:
    start = _position(random_, data)
    data[start:start] = random_.choice((random_.randbytes(random_.randrange(40)), *_MAGICS))


def _position(random_: random.Random, data: bytearray) -> int:
    """Mostly in the first bytes of a message, where the fields are; payloads are long and dull."""
    if random_.random() < 0.7:
        found = data.find(random_.choice(_MAGICS), random_.randrange(len(data)))
        if found >= 0:
            return min(found + random_.randrange(40), len(data) - 1)
    return random_.randrange(len(data))


_MUTATIONS = (_flip, _flip, _number, _number, _cut, _repeat, _insert)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    inputs = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", file=sys.stderr)
    json.dump(asdict(run(inputs, seed)), sys.stdout)
    print()


if __name__ == "__main__":
    main()
