# SPDX-License-Identifier: Apache-2.0
"""What Debian's NBD programs make of the server."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.exports import DIRTY, MemoryExport
from tests.nbd.serve import COMMAND, SIZE, environment
from tests.nbd.wire import ThreadedServer

MIB = 1 << 20


def run(*command: str | Path) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture
def export(seed: int) -> MemoryExport:
    """16 MiB; data in the second MiB, which is also dirty."""
    export = MemoryExport(16 * MIB)
    export.data[MIB : 2 * MIB] = random.Random(seed).randbytes(MIB)
    export.holes[256:512] = bytes(256)
    export.dirty[256:512] = b"\x01" * 256
    return export


@pytest.fixture
def server(export: MemoryExport, short_dir: Path) -> Iterator[ThreadedServer]:
    with ThreadedServer(short_dir / "s", [export]) as server:
        yield server


@pytest.mark.tool("nbdinfo")
def test_nbdinfo_says_what_the_reference_server_says(server: ThreadedServer) -> None:
    info = json.loads(run("nbdinfo", "--json", server.uri()))
    export = info["exports"][0]
    assert (info["protocol"], info["structured"]) == ("newstyle-fixed", True)
    assert (export["export-name"], export["description"]) == ("disk", "a test disk")
    offers = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
    assert all(export[f"can_{offer}"] for offer in offers)
    sizes = {"minimum": 1, "preferred": 4096, "maximum": 33554432}
    assert {name: export[f"block_size_{name}"] for name in sizes} == sizes
    assert export["contexts"] == ["base:allocation", DIRTY, "qemu:allocation-depth"]
    assert "disk" in run("nbdinfo", "--list", server.uri())


@pytest.mark.tool("nbdinfo")
@pytest.mark.parametrize(
    ("context", "kinds"), [("base:allocation", (3, 0, 3)), (DIRTY, (0, 1, 0)), ("qemu:allocation-depth", (0, 1, 0))]
)
def test_nbdinfo_maps(server: ThreadedServer, context: str, kinds: tuple[int, ...]) -> None:
    extents: list[dict[str, Any]] = json.loads(run("nbdinfo", "--json", f"--map={context}", server.uri()))
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, MIB, kinds[0]),
        (MIB, MIB, kinds[1]),
        (2 * MIB, 14 * MIB, kinds[2]),
    ]


@pytest.mark.tool("nbdinfo")
def test_socket_activation() -> None:
    command = ["nbdinfo", "--json", "--", "[", *COMMAND, "]"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert json.loads(result.stdout)["exports"][0]["export-size"] == SIZE


@pytest.mark.tool("nbdcopy")
def test_nbdcopy_both_ways(server: ThreadedServer, export: MemoryExport, tmp_path: Path, seed: int) -> None:
    copy = tmp_path / "copy"
    run("nbdcopy", server.uri(), copy)
    assert copy.read_bytes() == export.data
    assert copy.stat().st_blocks * 512 <= 2 * MIB, "holes were not kept"
    data = random.Random(seed + 1).randbytes(16 * MIB)
    copy.write_bytes(data)
    run("nbdcopy", "--flush", copy, server.uri())
    assert export.data == data
    assert export.calls[-1] == ("flush", 1)


@pytest.mark.tool("qemu-img")
def test_qemu_img(server: ThreadedServer, export: MemoryExport, tmp_path: Path) -> None:
    info = json.loads(run("qemu-img", "info", "--output=json", server.uri()))
    assert info["virtual-size"] == 16 * MIB
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uri()))
    assert [(e["start"], e["length"], e["zero"]) for e in extents] == [
        (0, MIB, True),
        (MIB, MIB, False),
        (2 * MIB, 14 * MIB, True),
    ]
    raw = tmp_path / "raw"
    raw.write_bytes(export.data)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, server.uri())
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), tmp_path / "qcow2")
    assert "identical" in run("qemu-img", "compare", tmp_path / "qcow2", server.uri())
    bitmap = f"driver=nbd,path={server.path},server.type=unix,export=disk,x-dirty-bitmap={DIRTY}"
    bitmap = bitmap.replace(f"path={server.path},server.type=unix", f"server.type=unix,server.path={server.path}")
    dirty = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", bitmap))
    assert [e["start"] for e in dirty if not e["data"]] == [MIB]  # qemu's hack: dirty reads as "no data"


@pytest.mark.tool("qemu-io")
def test_qemu_io_patterns(server: ThreadedServer, export: MemoryExport) -> None:
    commands = ["write -P 0xab 4096 1M", "read -P 0xab 4096 1M", "write -z 8192 64k", "read -P 0 8192 64k",
                "write -z -u 1M 128k", "discard 2M 1M", "write -f -P 0xcd 3M 512", "read -P 0xcd 3M 512", "flush",
                "write -P 0x11 3M 8M", "read -P 0x11 3M 8M"]  # fmt: skip
    words = [word for command in commands for word in ("-c", command)]
    assert "failed" not in run("qemu-io", "-f", "raw", *words, server.uri())
    assert {"zero", "punch", "trim", "flush"} <= {name for name, _ in export.calls}


@pytest.mark.tool("nbdkit", "nbdcopy", "nbdinfo")
def test_nbdkit_as_a_proxy(server: ThreadedServer, export: MemoryExport, tmp_path: Path) -> None:
    proxy = ["nbdkit", "-U", "-", "nbd", f"socket={server.path}", "export=disk", "--filter=blocksize", "--run"]
    run(*proxy, f'nbdcopy "$uri" {tmp_path}/copy')
    assert (tmp_path / "copy").read_bytes() == export.data
    assert '"type": 3' in run(*proxy, 'nbdinfo --json --map "$uri"')


@pytest.mark.tool("fio")
def test_fio_verifies_what_it_wrote(server: ThreadedServer) -> None:
    report = run("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randwrite", "--bs=4k",
                 "--size=8m", "--iodepth=16", "--verify=crc32c", "--do_verify=1",
                 "--verify_state_save=0", "--output-format=json")  # fmt: skip
    assert json.loads(report[report.index("{") :])["jobs"][0]["error"] == 0
