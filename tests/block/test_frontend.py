# SPDX-License-Identifier: Apache-2.0
"""Kernel nodes of exports, each kind that this host has, against a foreign NBD server.

The same tests run on kernels that have more: `tools/vmtest test -- tests/block/test_frontend.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stasis.block import frontend
from stasis.block.frontend import kernel_nbd, nbdfuse, nbdublk
from stasis.errors import BusyError, StasisError, StateError, UnsupportedError
from stasis.linux import blockdev
from stasis.nbd import protocol as p
from stasis.nbd.uri import NbdUri
from tests.unmounting import unmount

SIZE = 64 << 20

pytestmark = [pytest.mark.root, pytest.mark.tool("nbdkit", "mkfs.ext4")]


class Server:
    """nbdkit serving one file, which can be killed and started again on the same socket."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.socket = directory / "nbd.sock"
        self.file = directory / "file"
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        with self.file.open("wb") as file:
            file.truncate(SIZE)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(["nbdkit", "-f", "-U", self.socket, *self.options, "file", self.file])
        deadline = time.monotonic() + 30
        while not self._answers():  # the socket is there before anybody listens on it
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return not client.connect_ex(str(self.socket))

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(short_dir: Path) -> Iterator[Server]:
    server = Server(short_dir)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def directory(short_dir: Path) -> Iterator[Path]:
    yield short_dir / "node"
    assert not (short_dir / "node").exists()


@pytest.fixture(params=[kernel_nbd.KIND, nbdublk.KIND, nbdfuse.KIND])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param not in frontend.probe():
        pytest.skip(f"this host has no {request.param}")
    return str(request.param)


@contextlib.contextmanager
def connected(server: Server, directory: Path, kind: str, **options: Any) -> Iterator[frontend.Node]:
    node = frontend.connect(server.uri, name="test", directory=directory, kind=kind, **options)
    try:
        yield node
    finally:
        frontend.disconnect(node.state)


def properties(path: str) -> tuple[int, int, bool]:
    with open(path, "rb", buffering=0) as device:
        number = device.fileno()
        return blockdev.size(number), blockdev.logical_block_size(number), blockdev.is_read_only(number)


def test_what_is_written_to_the_node_is_in_the_export(server: Server, directory: Path, kind: str) -> None:
    data = os.urandom(3 << 20)
    with connected(server, directory, kind, size=SIZE) as node:
        assert node.kind == kind
        assert stat.S_ISBLK(os.stat(node.path).st_mode)
        assert properties(node.path) == (SIZE, 512, False)
        with open(node.path, "rb+", buffering=0) as device:  # no fsync: disconnect flushes
            device.seek(1 << 20)
            device.write(data)
    with server.file.open("rb") as file:
        file.seek(1 << 20)
        assert file.read(len(data)) == data


def test_state_is_plain_data_and_another_process_can_use_it(server: Server, directory: Path, kind: str) -> None:
    node = frontend.connect(server.uri, name="test", directory=directory, kind=kind)
    code = "import json, sys; from stasis.block import frontend; frontend.disconnect(json.load(sys.stdin))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    state = json.dumps(node.state)
    subprocess.run([sys.executable, "-c", code], input=state, text=True, env=environment, check=True)
    frontend.disconnect(json.loads(state))  # is gone, which is no error


def test_state_of_an_earlier_boot_touches_nothing(server: Server, directory: Path, kind: str) -> None:
    with connected(server, directory, kind) as node:
        frontend.disconnect(node.state | {"boot": "another", "directory": str(directory / "other")})
        assert properties(node.path)[0] == SIZE


def test_mounted_node_is_refused_with_its_mount_point(
    server: Server, directory: Path, kind: str, tmp_path: Path
) -> None:
    with connected(server, directory, kind) as node:
        subprocess.run(["mkfs.ext4", "-q", node.path], check=True)
        subprocess.run(["mount", node.path, tmp_path], check=True)
        try:
            with pytest.raises(BusyError, match=str(tmp_path)):
                frontend.disconnect(node.state)
            (tmp_path / "still").write_text("works")
        finally:
            unmount(tmp_path)
    subprocess.run(["e2fsck", "-fn", server.file], check=True, capture_output=True)


def test_node_open_in_a_process_is_refused_with_its_name(server: Server, directory: Path, kind: str) -> None:
    code = "import sys; f = open(sys.argv[1], 'rb'); print('up', flush=True); sys.stdin.read()"
    with connected(server, directory, kind) as node:
        holder = subprocess.Popen(
            [sys.executable, "-c", code, node.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "up\n"
            with pytest.raises(BusyError, match=f"pid {holder.pid}"):
                frontend.disconnect(node.state)
            holder.communicate("")


@pytest.mark.parametrize("options", [("-r",), ()])
def test_read_only_export_or_wish_makes_a_read_only_node(
    short_dir: Path, directory: Path, kind: str, options: tuple[str, ...]
) -> None:
    server = Server(short_dir, *options)
    server.start()
    try:
        with connected(server, directory, kind, read_only=not options) as node:
            assert properties(node.path)[2]
    finally:
        server.stop()


def test_sector_is_the_exports_smallest_block_and_a_short_tail_is_cut(
    server: Server, directory: Path, kind: str
) -> None:
    server.stop()
    os.truncate(server.file, SIZE + 512)
    server.start()
    if kind == nbdublk.KIND:
        pytest.skip("nbdublk chooses its own block size")
    with connected(server, directory, kind, sector=4096) as node:
        assert properties(node.path) == (SIZE, 4096, False)


def test_export_of_another_size_is_refused_and_nothing_is_left(server: Server, directory: Path, kind: str) -> None:
    with pytest.raises(StateError, match=f"{SIZE}"):
        frontend.connect(server.uri, SIZE + 512, name="test", directory=directory, kind=kind)


def test_no_server_leaves_nothing_behind(directory: Path, short_dir: Path, kind: str) -> None:
    with pytest.raises(OSError, match="No such file"):
        frontend.connect(f"nbd+unix:///?socket={short_dir}/none", name="test", directory=directory, kind=kind)


def test_node_of_a_dead_server_can_be_taken_apart(server: Server, directory: Path, kind: str) -> None:
    node = frontend.connect(server.uri, name="test", directory=directory, kind=kind)
    server.stop(signal.SIGKILL)
    frontend.disconnect(node.state)


def test_connection_for_the_kernel_answers_with_simple_replies(server: Server) -> None:
    """The kernel's client takes a structured reply for garbage and gives the connection up."""
    sock, said = kernel_nbd._dial(NbdUri.parse(server.uri))
    with sock:
        assert said.size == SIZE
        sock.sendall(p.REQUEST.pack(p.NBD_REQUEST_MAGIC, 0, p.NBD_CMD_READ, 1, 0, 512))
        reply = sock.recv(p.SIMPLE_REPLY.size, socket.MSG_WAITALL)
        assert p.SIMPLE_REPLY.unpack(reply) == (p.NBD_SIMPLE_REPLY_MAGIC, 0, 1)


class TestReconnect:
    def test_mounted_device_goes_on_after_its_server_was_killed(
        self, server: Server, directory: Path, kind: str, tmp_path: Path
    ) -> None:
        if kind != kernel_nbd.KIND:
            pytest.skip("only the kernel's client can be connected again")
        with connected(server, directory, kind) as node:
            subprocess.run(["mkfs.ext4", "-q", node.path], check=True)
            subprocess.run(["mount", node.path, tmp_path], check=True)
            try:
                (tmp_path / "before").write_bytes(b"b" * 100_000)
                os.sync()
                server.stop(signal.SIGKILL)
                (tmp_path / "meanwhile").write_bytes(b"m" * 100_000)
                server.start()
                frontend.reconnect(node.state)
                os.sync()
                assert (tmp_path / "before").read_bytes() == b"b" * 100_000
            finally:
                unmount(tmp_path)
        subprocess.run(["e2fsck", "-fn", server.file], check=True, capture_output=True)
        dump = ["debugfs", "-R", "cat /meanwhile", server.file]
        assert subprocess.run(dump, check=True, capture_output=True).stdout == b"m" * 100_000

    def test_live_connection_is_not_replaced(
        self, server: Server, directory: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if kind != kernel_nbd.KIND:
            pytest.skip("only the kernel's client can be connected again")
        monkeypatch.setattr(kernel_nbd, "ADOPTION_WAIT", 0.5)
        with connected(server, directory, kind) as node:
            with pytest.raises(StateError, match="looks alive"):
                frontend.reconnect(node.state)
            assert properties(node.path)[0] == SIZE

    def test_changed_size_and_lost_node_are_refused(self, server: Server, directory: Path, kind: str) -> None:
        if kind != kernel_nbd.KIND:
            pytest.skip("only the kernel's client can be connected again")
        with connected(server, directory, kind) as node:
            server.stop(signal.SIGKILL)
            os.truncate(server.file, SIZE + 4096)
            server.start()
            with pytest.raises(StateError, match=f"{SIZE + 4096}"):
                frontend.reconnect(node.state)
        with pytest.raises(StateError, match="any more"):
            frontend.reconnect(node.state)

    def test_kinds_that_cannot_say_so(self, server: Server, directory: Path, kind: str) -> None:
        if kind == kernel_nbd.KIND:
            pytest.skip("the kernel's client can")
        with connected(server, directory, kind) as node, pytest.raises(UnsupportedError, match="new connection"):
            frontend.reconnect(node.state)


class TestWithoutHelp:
    def test_host_without_anything_says_what_to_install(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (kernel_nbd, nbdublk, nbdfuse):
            monkeypatch.setattr(module, "probe", lambda: False)
        with pytest.raises(UnsupportedError) as caught:
            frontend.connect("nbd+unix:///?socket=/none", name="test", directory=directory)
        assert "nbdfuse" in caught.value.hint
        assert "modprobe nbd" in caught.value.hint

    @pytest.mark.tool("nbdfuse")
    def test_program_that_fails_is_quoted(
        self, server: Server, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "nbdfuse"
        program.write_text("#!/bin/sh\necho fuse is on holiday >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        if nbdfuse.KIND not in frontend.probe():
            pytest.skip("this host has no FUSE or no loop devices")
        with pytest.raises(StasisError, match="fuse is on holiday"):
            frontend.connect(server.uri, name="test", directory=directory, kind=nbdfuse.KIND)
