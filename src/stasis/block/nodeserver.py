# SPDX-License-Identifier: Apache-2.0
"""Serving a block device that somebody else made, the image of a kernel module's snapshot say, as it is.

`python -m stasis.block.nodeserver --config-fd N`. It is opened for writing where that is allowed: such an image may be
written to, and its module notes that. It ends with SIGTERM, or when the node has gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any

from stasis.block import settings as settings_module
from stasis.block.exports import OriginExport
from stasis.block.origin import Origin
from stasis.block.serving import read_config, signals_stop, start_servers
from stasis.linux import blockdev, files
from stasis.linux.eventloop import EventLoop
from stasis.nbd.export import ExportList

NODE_CHECK_SECONDS = 10.0


def build(config: dict[str, Any]) -> OriginExport:
    """The export that a configuration describes. OSError."""
    path = config["path"]
    fd, read_only = _open(path)
    direct = _direct(fd, read_only)
    origin = Origin(path, fd) if direct is None else Origin(path, direct, fd)
    export = OriginExport(config["name"], origin, None)
    export.description, export.read_only = f"snapshot image {path}", read_only
    export.can_trim = export.can_zero = not read_only
    return export


def _open(path: str) -> tuple[int, bool]:
    """(descriptor, whether it is only for reading)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if not blockdev.is_block_device(fd) or not blockdev.is_read_only(fd):
            return fd, False
        os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), True


def _direct(fd: int, read_only: bool) -> int | None:
    """A second descriptor past the page cache, None where there is no such I/O."""
    try:
        return files.reopen(fd, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_DIRECT)
    except OSError:
        return None


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m stasis.block.nodeserver`."""
    config = read_config(sys.argv[1:] if arguments is None else arguments)
    loop = EventLoop()
    export = build(config)
    servers = start_servers(loop, ExportList(export), config, settings_module.Settings())
    loop.every(NODE_CHECK_SECONDS, lambda: None if os.path.exists(config["path"]) else loop.stop())
    with signals_stop(loop, loop.stop):
        loop.run()
    for server in servers:
        server.close()
    if not export.read_only:
        with contextlib.suppress(OSError):  # the module may have taken the image away
            export.flush()
    export.origin.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
