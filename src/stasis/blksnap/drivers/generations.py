# SPDX-License-Identifier: Apache-2.0
"""The generations of blksnap's interface that have filter requests, as data: numbers, storage, events."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from stasis.blksnap.uapi import current, v5, v7

__all__ = ["CURRENT", "FILTER_NAME", "GENERATIONS", "V5", "V6", "V7", "Generation", "Storage"]

FILTER_NAME = b"blksnap"


class Storage(Enum):
    """How a generation is given its difference storage."""

    PATH = "path"
    DESCRIPTOR = "descriptor"
    RANGES = "ranges"


@dataclass(frozen=True)
class Generation:
    """One generation; `attach_options` tells that attaching takes the larger structure."""

    label: str
    attach: int
    detach: int
    ctl: int
    version: int
    create: int
    destroy: int
    take: int
    collect: int
    wait: int
    storage: Storage
    events: dict[int, str]
    attach_options: bool = False


CURRENT = Generation(
    "6.15", current.BLKFILTER_ATTACH, current.BLKFILTER_DETACH, current.BLKFILTER_CTL,
    current.IOCTL_BLKSNAP_VERSION, current.IOCTL_BLKSNAP_SNAPSHOT_CREATE, current.IOCTL_BLKSNAP_SNAPSHOT_DESTROY,
    current.IOCTL_BLKSNAP_SNAPSHOT_TAKE, current.IOCTL_BLKSNAP_SNAPSHOT_COLLECT,
    current.IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT, Storage.PATH,
    {current.EventCode.CORRUPTED: "corrupted", current.EventCode.NO_SPACE: "no_space"}, attach_options=True,
)
V7 = Generation(
    "v7", v7.BLKFILTER_ATTACH, v7.BLKFILTER_DETACH, v7.BLKFILTER_CTL, CURRENT.version, CURRENT.create,
    CURRENT.destroy, CURRENT.take, CURRENT.collect, CURRENT.wait, Storage.PATH, {v7.EVENT_CORRUPTED: "corrupted"},
)
V6 = Generation(
    "v6", V7.attach, V7.detach, V7.ctl, V7.version, V7.create, V7.destroy, V7.take, V7.collect, V7.wait,
    Storage.DESCRIPTOR, V7.events,
)
V5 = Generation(
    "v5", V7.attach, V7.detach, V7.ctl, v5.IOCTL_BLKSNAP_VERSION, v5.IOCTL_BLKSNAP_SNAPSHOT_CREATE,
    v5.IOCTL_BLKSNAP_SNAPSHOT_DESTROY, v5.IOCTL_BLKSNAP_SNAPSHOT_TAKE, v5.IOCTL_BLKSNAP_SNAPSHOT_COLLECT,
    v5.IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT, Storage.RANGES,
    {v5.EventCode.LOW_FREE_SPACE: "low_space", v5.EventCode.CORRUPTED: "corrupted"},
)

GENERATIONS = (CURRENT, V7, V6, V5)
