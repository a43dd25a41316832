# SPDX-License-Identifier: Apache-2.0
"""What this machine offers for live devices, found by trying and not from a version."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from stasis.errors import StasisError
from stasis.linux import btf
from stasis.linux.btf import BtfError
from stasis.live import identity, kerneltypes, pins

__all__ = ["PROBES", "Capability", "probe"]


@dataclass(frozen=True)
class Capability:
    """Something that is there or not, and what it comes to or why it is missing."""

    name: str
    available: bool
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Probe = Callable[[str | None], list[Capability]]


def probe(device: str | None = None) -> list[Capability]:
    """Everything that PROBES find out, for a device or for the machine."""
    return [found for one in PROBES for found in one(device)]


def _root(_: str | None) -> list[Capability]:
    root = os.geteuid() == 0
    return [Capability("root", root, "" if root else "tracking needs root")]


def _types(_: str | None) -> list[Capability]:
    name = "kernel types (BTF)"
    try:
        types = btf.read_vmlinux()
    except OSError as error:
        return [Capability(name, False, f"{btf.VMLINUX}: {error.strerror}")]
    except BtfError as error:
        return [Capability(name, False, f"{btf.VMLINUX}: {error}")]
    found = [Capability(name, True, str(btf.VMLINUX))]
    for event in kerneltypes.EVENTS:
        try:
            types.find(f"btf_trace_{event}")
        except BtfError:
            found.append(Capability(f"tracepoint {event}", False, "the kernel has none of this name"))
        else:
            found.append(Capability(f"tracepoint {event}", True, ""))
    return found


def _programs(_: str | None) -> list[Capability]:
    try:
        with pins.locked():
            pins.try_loading()
    except StasisError as error:
        return [Capability("tracking programs", False, error.message)]
    return [Capability("tracking programs", True, "the kernel accepts them")]


def _device(device: str | None) -> list[Capability]:
    if device is None:
        return []
    try:
        who = identity.identify(device)
        bios = identity.takes_bios(who)
    except StasisError as error:
        return [Capability("device", False, error.message)]
    return [Capability("device", True, "takes bios: each write in flight is noted" if bios else "takes requests")]


def _ways(device: str | None) -> list[Capability]:
    from stasis.live.providers import probe_ways  # imported late: it imports this

    return probe_ways(device)


PROBES: list[Probe] = [_root, _types, _programs, _device, _ways]
