# SPDX-License-Identifier: Apache-2.0
"""Real worker processes for tests: started as the daemon does it, spoken to over their control sockets."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stasis.block.changemap import ChangeMap
from stasis.block.chunktable import ChunkTable
from stasis.block.diffstorage import DiffStorage, private_descriptor
from stasis.block.image import ImageExport
from stasis.block.opening import open_origin
from stasis.block.origin import Origin
from stasis.block.settings import Settings
from stasis.nbd.client import Client
from stasis.nbd.uri import NbdUri

SNAPSHOT = "5eaf00d0-0000-4000-8000-000000000001"

Answer = dict[str, Any]


class Control:
    """One connection to a worker's control socket."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(30)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise

    def send(self, op: str, fds: Sequence[int] = (), **fields: object) -> None:
        socket.send_fds(self.sock, [json.dumps({"op": op, **fields}).encode()], list(fds))

    def receive(self) -> tuple[Answer, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 8)
        return json.loads(data) if data else {}, fds

    def ask(self, op: str, fds: Sequence[int] = (), **fields: object) -> Answer:
        """A request and its answer, whatever it is."""
        self.send(op, fds, **fields)
        answer, received = self.receive()
        for fd in received:
            os.close(fd)
        return answer

    def do(self, op: str, fds: Sequence[int] = (), **fields: object) -> Answer:
        """A request that must succeed."""
        answer = self.ask(op, fds, **fields)
        assert answer.get("ok"), (op, answer)
        return answer

    def refused(self, errno: int, op: str, fds: Sequence[int] = (), **fields: object) -> None:
        """A request that must fail with this errno."""
        answer = self.ask(op, fds, **fields)
        assert (answer.get("ok"), answer.get("errno")) == (False, errno), (op, answer)

    def close(self) -> None:
        self.sock.close()


class WorkerProcess:
    """A worker and what the daemon would keep for it: the open origin, the listening socket, the storage."""

    def __init__(
        self,
        directory: Path,
        origin: Path,
        name: str = "x",
        *,
        buffered: bool = True,
        settings: dict[str, int] | None = None,
        tracking: bool = True,
    ) -> None:
        self.directory, self.name, self.tracking = directory, name, tracking
        self.settings = settings or {}
        self.state = directory / f"{name}.state"
        self.state.mkdir()
        self.origin = open_origin(str(origin), buffered=buffered)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(directory / f"{name}.sock"))
        self.listener.listen(16)
        self.storage: DiffStorage | None = None
        self.chunk_shift = 16
        self._closing = contextlib.ExitStack()
        self.start(continuity=False)

    # -- life -------------------------------------------------------------------------------------

    def start(self, *, continuity: bool = True, resume: bool = False) -> None:
        config: dict[str, Any] = {
            "name": self.name,
            "path": self.origin.path,
            "origin_fd": self.origin.fd,
            "buffered_fd": self.origin.buffered_fd if self.origin.direct else None,
            "listen_fd": self.listener.fileno(),
            "control_path": str(self.directory / f"{self.name}.ctl"),
            "inner_path": str(self.directory / f"{self.name}.inner"),
            "map_path": str(self.state / "map"),
            "settings": self.settings,
            "tracking": self.tracking,
            "continuity": continuity,
            "snapshot": None,
        }
        fds = {self.origin.fd, self.origin.buffered_fd, self.listener.fileno()}
        if resume and self.storage is not None:
            config["snapshot"] = {"uuid": SNAPSHOT, "storage_fd": self.storage.fd, **self._places()}
            fds.add(self.storage.fd)
        memory = os.memfd_create("configuration")
        os.write(memory, json.dumps(config).encode())
        command = [sys.executable, "-m", "stasis.block.worker", "--config-fd", str(memory)]
        self.process = subprocess.Popen(command, pass_fds={memory, *fds}, env=self._environment())
        os.close(memory)
        self.control = self._connect()

    @staticmethod
    def _environment() -> dict[str, str]:
        import stasis

        return {**os.environ, "PYTHONPATH": str(Path(stasis.__file__).parents[1])}

    def _places(self) -> dict[str, str]:
        return {"table": str(self.state / "table"), "storage": str(self.state / "storage")}

    def _connect(self) -> Control:
        deadline = time.monotonic() + 30
        while True:
            assert self.process.poll() is None, "the worker ended"
            try:
                control = Control(self.directory / f"{self.name}.ctl")
            except OSError:
                assert time.monotonic() < deadline, "the worker does not come up"
                time.sleep(0.01)
                continue
            if control.do("hello")["pid"] == self.process.pid:
                return control
            control.close()

    def connection(self) -> Control:
        """One more control connection; ends with the worker."""
        control = Control(self.directory / f"{self.name}.ctl")
        self._closing.callback(control.close)
        return control

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.control.close()

    def stop(self) -> None:
        """End in order."""
        self.control.do("stop")
        self.process.wait(30)
        self.control.close()

    def close(self) -> None:
        self._closing.close()
        if self.process.poll() is None:
            self.kill()
        if self.storage is not None:
            self.storage.close()
        self.listener.close()
        self.origin.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- use --------------------------------------------------------------------------------------

    @property
    def uri(self) -> NbdUri:
        return NbdUri(socket=str(self.directory / f"{self.name}.sock"), export=self.name)

    def client(self, contexts: Sequence[str] = ()) -> Client:
        return Client.connect(self.uri, contexts=contexts, timeout=60)

    def map(self) -> ChangeMap:
        return ChangeMap.open_readonly(self.state / "map")

    def changed(self, since: int) -> list[tuple[int, int]]:
        with self.map() as changes:
            return changes.changed_extents(since)

    def prepare(self, storage: str = "memory", limit: int | None = None, portion: int = 16 << 20) -> None:
        for path in self._places().values():
            Path(path).unlink(missing_ok=True)
        if self.storage is not None:
            self.storage.close()
        settings = replace(Settings(), diff_storage_minimum=portion)
        self.storage = DiffStorage.create(storage, self.state / "storage", settings, limit=limit)
        self.control.do("prepare", [self.storage.fd], snapshot=SNAPSHOT, chunk_shift=self.chunk_shift, **self._places())

    def take(self, storage: str = "memory", limit: int | None = None, portion: int = 16 << 20) -> Answer:
        """Prepare, hold, switch, release, sync; the answer to switch."""
        self.prepare(storage, limit, portion)
        self.control.do("hold", timeout_ms=5000)
        switched = self.control.do("switch")
        self.control.do("release")
        self.control.do("sync")
        return switched

    def drop(self) -> None:
        self.control.do("drop", snapshot=SNAPSHOT)

    def snapshot(self) -> Answer:
        """Counters of the held snapshot."""
        answer: Answer = self.control.do("info")["snapshot"]
        return answer

    @contextlib.contextmanager
    def image(self) -> Iterator[ImageExport]:
        """The image, read in this process, written through the worker."""
        assert self.storage is not None
        with contextlib.ExitStack() as stack:
            fds = [os.dup(self.origin.fd)]
            if self.origin.direct:
                fds.append(os.dup(self.origin.buffered_fd))
            origin = Origin(self.origin.path, *fds)
            stack.callback(origin.close)
            table = ChunkTable.open(self.state / "table")
            stack.callback(table.close)
            fd = private_descriptor(self.storage.fd)
            stack.callback(os.close, fd)
            inner = NbdUri(socket=str(self.directory / f"{self.name}.inner"), export="image")

            def connect() -> Client:
                client = Client.connect(inner, timeout=60)
                stack.callback(client.close)
                return client

            yield ImageExport("image", origin, table, fd, None, (), connect)
