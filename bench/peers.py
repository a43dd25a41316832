# SPDX-License-Identifier: Apache-2.0
"""The servers that stasis is measured against, started as their own manuals say."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from lab import Lab, LabError, wait_for

__all__ = ["QemuFleecing", "nbd_uri", "start_nbdkit", "start_qemu"]


def nbd_uri(socket_path: Path, export: str = "") -> str:
    """The URI of an export on a unix socket."""
    return f"nbd+unix:///{export}?socket={socket_path}"


def start_nbdkit(lab: Lab, image: Path) -> str:
    """nbdkit's file plugin with its defaults: 16 threads, page-cached; the URI."""
    socket_path = lab.path("nbdkit.sock")
    process = lab.start(["nbdkit", "--foreground", "--unix", socket_path, "file", image])
    wait_for(socket_path.exists, "nbdkit", process)
    return nbd_uri(socket_path)


def start_qemu(lab: Lab, image: Path) -> str:
    """qemu-storage-daemon, a file and an NBD export; the URI."""
    socket_path = lab.path("qemu.sock")
    process = lab.start(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket_path},max-connections=0"),
            *("--export", "nbd,id=live,node-name=file,name=live,writable=on"),
        ]
    )
    wait_for(socket_path.exists, "qemu-storage-daemon", process)
    return nbd_uri(socket_path, "live")


class QemuFleecing:
    """qemu-storage-daemon with a copy-before-write filter into a qcow2 file: its way to hold a snapshot.

    Exports ``live`` and, after `take`, ``snapshot``.
    """

    def __init__(self, lab: Lab, image: Path, size: int) -> None:
        self._lab = lab
        self._size = size
        self._socket = lab.path("fleece.sock")
        self._monitor_path = lab.path("fleece.qmp")
        self._fleece = lab.path("fleece.qcow2")
        process = lab.start(self._command(image))
        wait_for(lambda: self._socket.exists() and self._monitor_path.exists(), "qemu-storage-daemon", process)
        self._monitor = Monitor(lab, self._monitor_path)
        self.live = nbd_uri(self._socket, "live")
        self.snapshot = nbd_uri(self._socket, "snapshot")

    def _command(self, image: Path) -> list[str]:
        return [
            "qemu-storage-daemon",
            *("--chardev", f"socket,id=q,path={self._monitor_path},server=on,wait=off"),
            *("--monitor", "chardev=q"),
            *("--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap"),
            *("--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"),
            # The handle that blockdev-reopen puts the filter under.
            *("--blockdev", "driver=raw,node-name=top,file=disk,discard=unmap"),
            *("--nbd-server", f"addr.type=unix,addr.path={self._socket},max-connections=0"),
            *("--export", "nbd,id=live,node-name=top,name=live,writable=on"),
        ]

    def take(self) -> None:
        """Insert the filter: from here on the old contents go to the qcow2 file first."""
        self._lab.run(["qemu-img", "create", "-q", "-f", "qcow2", self._fleece, str(self._size)])
        call, file = self._monitor.call, {"driver": "file", "filename": str(self._fleece)}
        call("blockdev-add", {"driver": "qcow2", "node-name": "fleece", "file": file})
        cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "fleece"}
        call("blockdev-add", cbw)
        top = {"driver": "raw", "node-name": "top", "file": "cbw", "discard": "unmap"}
        call("blockdev-reopen", {"options": [top]})
        call("blockdev-add", {"driver": "snapshot-access", "node-name": "snapshot", "file": "cbw"})
        export = {"type": "nbd", "id": "snapshot", "node-name": "snapshot", "name": "snapshot"}
        call("block-export-add", export)


class Monitor:
    """QEMU's machine protocol: one JSON object per line each way."""

    def __init__(self, lab: Lab, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        lab.on_exit(self._socket.close)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("r")
        lab.on_exit(self._file.close)
        self._file.readline()
        self.call("qmp_capabilities", {})

    def call(self, command: str, arguments: dict[str, Any]) -> None:
        """Run one command. Raises LabError with QEMU's words."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        for line in self._file:
            reply = json.loads(line)
            if "error" in reply:
                raise LabError(f"{command}: {reply['error'].get('desc')}")
            if "return" in reply:
                return
        raise LabError(f"{command}: qemu-storage-daemon closed its monitor")
