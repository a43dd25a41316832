# SPDX-License-Identifier: Apache-2.0
"""UTS namespaces: host name and domain name (uts_namespaces(7))."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stasis.linux import libc
from stasis.linux.namespaces import FLAGS, unshare
from stasis.process.images.schema.namespaces import UtsnsEntry

if TYPE_CHECKING:
    from stasis.process.findings import Findings
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter
    from stasis.process.namespaces.own import Settings

__all__ = ["check", "make", "write"]

# /proc/sys shows those of the namespace of whoever reads.
NODE, DOMAIN = Path("/proc/sys/kernel/hostname"), Path("/proc/sys/kernel/domainname")


def check(root: int, findings: Findings) -> None:
    """All of it can be kept."""


def write(root: int, number: int, out: ImageSetWriter) -> list[str]:
    """Both names."""
    node, domain = (path.read_text(errors="surrogateescape").removesuffix("\n") for path in (NODE, DOMAIN))
    out.write("utsns", UtsnsEntry(nodename=node, domainname=domain), number=number)
    return []


def make(number: int, chain: list[ImageSet], settings: Settings) -> None:
    """A namespace with these names."""
    found: UtsnsEntry = chain[0].one("utsns", number)
    unshare(FLAGS["uts"])
    for call, name in ((libc.libc.sethostname, found.nodename), (libc.libc.setdomainname, found.domainname)):
        libc.check(call(os.fsencode(name), len(os.fsencode(name))), "sethostname", name)
