# SPDX-License-Identifier: Apache-2.0
"""`blksnap version`."""

from __future__ import annotations

import stasis
from stasis.cli.blksnap.session import Session, failing

__all__ = ["VERSION", "version"]

VERSION = (2, 0, 0, 0)
"""Version of the interface that is spoken here: that of blksnap's `master` and `stable-v2.0`."""


def version(session: Session) -> None:
    """Print the version of the interface, once it is there to be asked."""
    client = session.client
    with failing("Failed to get version."):
        client.status()
    text = ".".join(map(str, VERSION))
    session.show({"version": text, "stasis": stasis.__version__}, text)
