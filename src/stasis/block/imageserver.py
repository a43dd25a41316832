# SPDX-License-Identifier: Apache-2.0
"""The image server of one device of a taken snapshot: a process, and a second one for every other client.

`python -m stasis.block.imageserver --config-fd N`. It holds nothing that matters: killed, it is started again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stasis.block import settings as settings_module
from stasis.block.changemap import ChangeMap
from stasis.block.chunktable import ChunkTable
from stasis.block.diffstorage import private_descriptor
from stasis.block.image import ImageExport
from stasis.block.origin import Origin
from stasis.block.serving import read_config, signals_stop, start_servers
from stasis.block.sibling import fork_sibling, serve_handed_over
from stasis.linux.eventloop import EventLoop
from stasis.nbd.client import Client
from stasis.nbd.export import ExportList
from stasis.nbd.uri import NbdUri

TABLE_CHECK_SECONDS = 10.0
"""How often an image server looks whether its snapshot still exists: a daemon that was killed between starting it
and writing down its pid leaves it to itself."""


def build(config: dict[str, Any]) -> ImageExport:
    """The image that a configuration describes."""
    origin = Origin(config["path"], config["origin_fd"], config.get("buffered_fd"))
    table = ChunkTable.open(Path(config["table"]))
    origin.size = table.size
    changes = ChangeMap.open_readonly(Path(config["map_path"])) if config.get("map_path") else None
    bitmaps = [(bitmap["name"], int(bitmap["since"])) for bitmap in config.get("bitmaps") or ()]
    address = NbdUri(socket=config["inner_path"], export="image")
    return ImageExport(
        config["name"],
        origin,
        table,
        private_descriptor(config["storage_fd"]),
        changes,
        bitmaps,
        lambda: Client.connect(address),
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m stasis.block.imageserver`."""
    config = read_config(sys.argv[1:] if arguments is None else arguments)
    sibling, handed_over = fork_sibling()
    loop = EventLoop()
    settings = settings_module.Settings().with_values(config.get("settings", {}))
    exports = ExportList(build(config))
    servers = start_servers(loop, exports, config, settings, listen=handed_over is None, sibling=sibling)
    if handed_over is not None:
        serve_handed_over(loop, handed_over, servers)
    table = Path(config["table"])
    loop.every(TABLE_CHECK_SECONDS, lambda: None if table.exists() else loop.stop())
    with signals_stop(loop, loop.stop):
        loop.run()
    for server in servers:
        server.close()
    if sibling is not None:
        sibling.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
