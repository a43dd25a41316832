# SPDX-License-Identifier: Apache-2.0
"""A small run of the protocol fuzzer; the bench runs a hundred thousand inputs."""

from tests.nbd import fuzz


def test_mutated_conversations_hurt_nobody(seed: int) -> None:
    report = fuzz.run(2000, seed)
    assert report.witness_checks == 125
    assert report.dropped > 200, "the mutations are too tame"
    assert report.bytes_received > 1 << 20, "the mutations are too wild: nothing gets through"
    assert report.memory_growth < 32 << 20
