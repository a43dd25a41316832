# SPDX-License-Identifier: Apache-2.0
"""Tests that need a stock kernel and disks to destroy: they run only inside the guest of `tools/vmtest test`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.block.frontend.node import load_module
from tests.vm.machine import Disk

MODULES = ("nbd", "loop", "dm-mod", "dm-log-writes", "ext4", "xfs")


def in_guest() -> bool:
    """Only the kernel command line is proof: these tests write to /dev/vda."""
    return "vmtest.job=" in Path("/proc/cmdline").read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True, scope="session")
def _modules() -> None:
    if not in_guest():
        pytest.skip("runs in a virtual machine: tools/vmtest test")
    for module in MODULES:
        load_module(module)


@pytest.fixture
def disks() -> Iterator[list[Disk]]:
    """The guest's empty disks, by their serial numbers; they begin and end without contents."""
    found = [Disk.by_serial(f"disk{number}") for number in range(3)]
    for disk in found:
        disk.wipe()
    yield found
    for disk in found:
        disk.wipe()
