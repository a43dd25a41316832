# SPDX-License-Identifier: Apache-2.0
"""A fake kernel with one disk, and the blksnap modules that may be loaded into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stasis.blksnap.drivers import Driver, Tracked, feeding, probe
from stasis.blksnap.drivers.generations import CURRENT, V5, V6, V7
from stasis.linux import files
from tests.blksnap.fake_blksnap import FakeBlksnap, FakeTracker
from tests.blksnap.fake_kernel import Disk, FakeKernel

MIB = 1 << 20
MODULES: dict[str, Callable[[FakeKernel], FakeBlksnap]] = {
    "6.15": lambda kernel: FakeBlksnap(kernel, CURRENT),
    "v7": lambda kernel: FakeBlksnap(kernel, V7),
    "v6": lambda kernel: FakeBlksnap(kernel, V6),
    "v5": lambda kernel: FakeBlksnap(kernel, V5),
    "v2": FakeTracker,
}
FILTERED = [name for name in MODULES if name != "v2"]


@dataclass
class Host:
    """A kernel with a blksnap module, and a disk of 4 MiB."""

    kernel: FakeKernel
    module: FakeBlksnap
    disk: Disk
    directory: Path

    def driver(self) -> Driver:
        return probe("blksnap", self.kernel, str(self.disk.path))

    def tracked(self, disk: Disk | None = None) -> Tracked:
        disk = disk or self.disk
        return Tracked(disk.path.name, str(disk.path), self.directory / f"{disk.path.name}.map")


def load(kernel: FakeKernel, generation: str) -> FakeBlksnap:
    module = MODULES[generation](kernel)
    kernel.load(module, "blksnap" if generation == "v2" else "blksnap-control")
    return module


HANDED_OVER = ("v5", "v2")
"""Generations that write to sectors behind a file: the file is made immutable, which only root can do."""


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake module writes nothing any more when its images are gone."""
    monkeypatch.setattr(feeding, "RELEASE_GRACE", 0.0)


@pytest.fixture
def kernel(short_dir: Path) -> Iterator[FakeKernel]:
    yield FakeKernel(short_dir)
    for path in short_dir.rglob("*.diff"):
        files.set_immutable(str(path), False)  # a snapshot that the test did not destroy


def _needs_root(generation: str) -> None:
    if generation in HANDED_OVER and os.geteuid() != 0:
        pytest.skip("needs root, to make a file immutable")


@pytest.fixture
def make_host(kernel: FakeKernel, short_dir: Path) -> Callable[[str], Host]:
    def make(generation: str) -> Host:
        _needs_root(generation)
        (short_dir / "storage").mkdir()
        return Host(kernel, load(kernel, generation), kernel.add_disk("sdb", 4 * MIB, (8, 16)), short_dir)

    return make


@pytest.fixture(params=list(MODULES))
def host(make_host: Callable[[str], Host], request: pytest.FixtureRequest) -> Host:
    """One for each generation."""
    return make_host(request.param)


@pytest.fixture(params=FILTERED)
def filtered(make_host: Callable[[str], Host], request: pytest.FixtureRequest) -> Host:
    """One for each generation that has filter requests."""
    return make_host(request.param)


@pytest.fixture
def newest(make_host: Callable[[str], Host]) -> Host:
    return make_host("6.15")
