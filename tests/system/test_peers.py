# SPDX-License-Identifier: Apache-2.0
"""Debian's NBD programs on the real exports: a served disk and the image of its snapshot."""

from __future__ import annotations

import errno
import json
import random
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from stasis.nbd.client import Client
from tests.runner import Stasis
from tests.system.conftest import MakeDisk
from tests.system.helpers import MIB, Disk, fio_command, fio_result, snapshot, tool

DIRTY = "qemu:dirty-bitmap:since-"
WORKER_MEMORY = 80 * MIB
"""What a worker may take beside one byte per tracking block and map and 16 bytes per chunk."""


@dataclass
class Exports:
    """A disk of 8 MiB, its second MiB written since the snapshot and its fourth one cleared."""

    disk: Disk
    image: str
    before: bytes


@pytest.fixture
def exports(stasis: Stasis, make_disk: MakeDisk, storage: Path) -> Iterator[Exports]:
    disk = make_disk("disk.img", 8 * MIB)
    before = bytes(disk.expected)
    with snapshot(stasis, storage, disk.name) as taken:
        with Client.connect(disk.uri) as client:
            disk.write(client, MIB, disk.random.randbytes(MIB))
            disk.clear(client, 3 * MIB, MIB, trim=False)
        yield Exports(disk, taken["devices"][0]["uri"], before)
    assert disk.read() == disk.expected == disk.path.read_bytes()


def _map(uri: str, context: str) -> list[tuple[int, int, int]]:
    extents = json.loads(tool("nbdinfo", "--json", f"--map={context}", uri))
    return [(entry["offset"], entry["length"], entry["type"]) for entry in extents]


@pytest.mark.tool("nbdinfo")
def test_nbdinfo(exports: Exports) -> None:
    for uri, bitmap in ((exports.disk.uri, f"{DIRTY}1"), (exports.image, f"{DIRTY}0")):
        shown = json.loads(tool("nbdinfo", "--json", uri))["exports"][0]
        assert shown["export-size"] == 8 * MIB
        assert set(shown["contexts"]) == {"base:allocation", "qemu:allocation-depth", bitmap}
        assert all(shown[f"can_{word}"] for word in ("flush", "fua", "multi_conn", "trim", "zero", "df"))
        assert not shown["is_read_only"]


@pytest.mark.tool("nbdinfo")
def test_nbdinfo_maps(exports: Exports) -> None:
    assert _map(exports.disk.uri, f"{DIRTY}1") == [
        (0, MIB, 0), (MIB, MIB, 1), (2 * MIB, MIB, 0), (3 * MIB, MIB, 1), (4 * MIB, 4 * MIB, 0)
    ]  # fmt: skip
    assert _map(exports.image, f"{DIRTY}0") == [(0, 8 * MIB, 0)]  # written since tracking began: nothing
    assert (3 * MIB, MIB, 3) in _map(exports.disk.uri, "base:allocation")
    assert _map(exports.image, "base:allocation") == [(0, 8 * MIB, 0)]
    depths = _map(exports.image, "qemu:allocation-depth")
    assert depths == [(0, MIB, 2), (MIB, MIB, 1), (2 * MIB, MIB, 2), (3 * MIB, MIB, 1), (4 * MIB, 4 * MIB, 2)]


@pytest.mark.tool("nbdcopy")
def test_nbdcopy_both_ways(exports: Exports, tmp_path: Path) -> None:
    tool("nbdcopy", exports.image, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == exports.before
    tool("nbdcopy", exports.disk.uri, tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == exports.disk.expected
    exports.disk.expected[:] = exports.disk.random.randbytes(8 * MIB)
    (tmp_path / "new").write_bytes(exports.disk.expected)
    tool("nbdcopy", "--flush", tmp_path / "new", exports.disk.uri)
    assert exports.disk.read(exports.image) == exports.before
    tool("nbdcopy", "--flush", tmp_path / "new", exports.image)
    assert exports.disk.read(exports.image) == exports.disk.expected


@pytest.mark.tool("qemu-img")
def test_qemu_img(exports: Exports, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(exports.before)
    assert json.loads(tool("qemu-img", "info", "--output=json", exports.image))["virtual-size"] == 8 * MIB
    assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, exports.image)
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, exports.disk.uri, status=[1])
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", exports.image, tmp_path / "qcow2")
    assert "identical" in tool("qemu-img", "compare", "-F", "raw", tmp_path / "qcow2", exports.image)
    extents = json.loads(tool("qemu-img", "map", "--output=json", "-f", "raw", exports.disk.uri))
    assert [(e["start"], e["length"]) for e in extents if e["zero"]] == [(3 * MIB, MIB)]


@pytest.mark.tool("qemu-img")
def test_qemu_reads_the_dirty_bitmap(exports: Exports) -> None:
    path = exports.disk.uri.partition("socket=")[2]
    options = f"driver=nbd,export=disk,server.type=unix,server.path={path},x-dirty-bitmap={DIRTY}1"
    extents = json.loads(tool("qemu-img", "map", "--output=json", "--image-opts", options))
    assert [e["start"] for e in extents if not e["data"]] == [MIB, 3 * MIB]  # qemu shows what is dirty as "no data"


@pytest.mark.tool("qemu-io")
def test_qemu_io_writes_to_the_image_alone(exports: Exports) -> None:
    commands = ["write -P 0xab 4096 1M", "read -P 0xab 4096 1M", "write -z 8192 64k", "read -P 0 8192 64k",
                "discard 2M 1M", "write -f -P 0xcd 3M 4096", "flush", "read -P 0xcd 3M 4096"]  # fmt: skip
    words = [word for command in commands for word in ("-c", command)]
    assert "failed" not in tool("qemu-io", "-f", "raw", *words, exports.image)


@pytest.mark.tool("nbdkit", "nbdcopy")
def test_nbdkit_as_a_proxy(exports: Exports, tmp_path: Path) -> None:
    proxy = ["nbdkit", "-U", "-", "nbd", f"uri={exports.image}", "--run"]
    tool(*proxy, f'nbdcopy "$uri" {tmp_path}/copy')
    assert (tmp_path / "copy").read_bytes() == exports.before


@pytest.mark.tool("fio")
def test_hostile_clients_disturb_nobody_and_memory_stays_bounded(
    stasis: Stasis, exports: Exports, make_disk: MakeDisk, libnbd: ModuleType
) -> None:
    busy = make_disk("busy.img", 16 * MIB)
    command = fio_command(busy.uri, "--size=16m", "--rate=16m")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        rounds = 0
        while job.poll() is None or rounds < 3:
            for uri in (busy.uri, exports.disk.uri, exports.image):
                _forbidden(libnbd, uri, 16 * MIB)
                _garbage(uri, random.Random(rounds))
            rounds += 1
        assert job.stdout is not None
        fio_result(job.stdout.read())
        assert job.returncode == 0
    for name in ("busy", "disk"):
        pid = stasis.json("device", "show", name)["pid"]
        status = Path(f"/proc/{pid}/status").read_text()
        resident = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        blocks = 16 * MIB >> 16
        assert resident <= WORKER_MEMORY + 2 * blocks + 16 * blocks
    assert exports.disk.read(exports.image) == exports.before


def _forbidden(libnbd: ModuleType, uri: str, beyond: int) -> None:
    """Requests that the protocol forbids; each gets an error, and the connection goes on."""
    handle = libnbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(uri)
    attempts = [
        lambda: handle.pread(4096, beyond),
        lambda: handle.pwrite(bytearray(4096), beyond),
        lambda: handle.zero(4096, 1 << 62),
        lambda: handle.trim(beyond, 4096),
        lambda: handle.pread(4096, 0, libnbd.CMD_FLAG_NO_HOLE),
        lambda: handle.flush(0x4000),
    ]
    for attempt in attempts:
        with pytest.raises(libnbd.Error) as caught:
            attempt()
        assert caught.value.errnum in (errno.EINVAL, errno.ENOSPC)
    assert len(handle.pread(4096, 0)) == 4096
    handle.shutdown()


def _garbage(uri: str, chance: random.Random) -> None:
    """A client that says nonsense, and one that goes away in the middle of a request."""
    path = uri.partition("socket=")[2]
    for words in (chance.randbytes(100_000), b"\0\0\0\x03" + b"IHAVEOPT" + b"\0\0\0\x07\xff\xff\xff\xff"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(path)
            try:
                client.sendall(words)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was thrown out before the end
