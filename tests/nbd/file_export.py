# SPDX-License-Identifier: Apache-2.0
"""A plain file as an export: the yardstick for what the server itself costs.

python tests/nbd/file_export.py FILE SOCKET [ALIGNMENT]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from stasis.linux.eventloop import EventLoop
from stasis.linux.iobuffer import IoBuffer
from stasis.nbd.export import Export, ExportList, Request
from stasis.nbd.listeners import unix_listener
from stasis.nbd.server import Server


class FileExport(Export):
    """A file read and written with one system call per request."""

    can_multi_conn = True

    def __init__(self, path: str, alignment: int = 1) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self.size = os.fstat(self._fd).st_size
        self.alignment = alignment

    def read(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        fd, view = self._fd, buffer.view
        for offset, length, position in requests:
            os.preadv(fd, [view[position : position + length]], offset)

    def write(self, buffer: IoBuffer, requests: Sequence[Request]) -> None:
        fd, view = self._fd, buffer.view
        for offset, length, position in requests:
            os.pwritev(fd, [view[position : position + length]], offset)

    def flush(self) -> None:
        os.fdatasync(self._fd)


def main() -> None:
    path, socket_path = sys.argv[1:3]
    loop = EventLoop()
    server = Server(loop, ExportList(FileExport(path, int(sys.argv[3]) if len(sys.argv) > 3 else 1)))
    server.add_listener(unix_listener(socket_path))
    loop.run()


if __name__ == "__main__":
    main()
