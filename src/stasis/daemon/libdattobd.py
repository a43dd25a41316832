# SPDX-License-Identifier: Apache-2.0
"""The eleven calls of libdattobd by their names; `from stasis import datto` has them.

Where the C library returns -1 and sets errno, OSError is raised with that errno. Sizes have the library's units: MiB
for files, bytes for caches, 0 for the default. Where /dev/datto-ctl would be missing because the module is not loaded,
here no daemon runs: ENOENT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL, EIO, ENOENT

from stasis.daemon.client import Client, connect
from stasis.daemon.model import Tracer
from stasis.errors import DaemonError, StasisError

__all__ = [
    "DattobdInfo",
    "dattobd_destroy",
    "dattobd_expand_cow_file",
    "dattobd_get_free_minor",
    "dattobd_info",
    "dattobd_reconfigure",
    "dattobd_reconfigure_auto_expand",
    "dattobd_reload_incremental",
    "dattobd_reload_snapshot",
    "dattobd_setup_snapshot",
    "dattobd_transition_incremental",
    "dattobd_transition_snapshot",
]

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class DattobdInfo:
    """struct dattobd_info: `falloc_size` is the COW file's size now, in bytes; `error` is 0 or a negative errno."""

    minor: int
    state: int
    error: int
    cache_size: int
    falloc_size: int
    seqid: int
    uuid: bytes
    cow: str
    bdev: str
    version: int
    nr_changed_blocks: int


@contextmanager
def _connected() -> Iterator[Client]:
    try:
        with connect(start_daemon=False) as client:
            yield client
    except StasisError as error:
        if isinstance(error, DaemonError) and error.message.startswith("no daemon runs"):
            raise OSError(ENOENT, error.message) from error
        failure = OSError(error.errno or EIO, error.message)
        failure.add_note(error.hint)
        raise failure from error


def _do(call: Callable[[Client], object]) -> None:
    with _connected() as client:
        call(client)


def dattobd_setup_snapshot(minor: int, bdev: StrPath, cow: StrPath, fallocated_space: int = 0,
                           cache_size: int = 0) -> None:
    """Begin a series on a device that is served."""
    _do(lambda client: client.datto_setup([(minor, bdev, cow)], fallocated_space=fallocated_space,
                                          cache_size=cache_size))


def dattobd_reload_snapshot(minor: int, bdev: StrPath, cow: StrPath, cache_size: int = 0) -> None:
    """Take a snapshot's COW file up when its device is attached next."""
    _do(lambda client: client.datto_reload(minor, bdev, cow, snapshot=True, cache_size=cache_size))


def dattobd_reload_incremental(minor: int, bdev: StrPath, cow: StrPath, cache_size: int = 0) -> None:
    """Take an incremental COW file up when its device is attached next."""
    _do(lambda client: client.datto_reload(minor, bdev, cow, snapshot=False, cache_size=cache_size))


def dattobd_destroy(minor: int) -> None:
    """End a tracer."""
    _do(lambda client: client.datto_destroy(minor))


def dattobd_transition_incremental(minor: int) -> None:
    """From snapshot mode to incremental mode."""
    _do(lambda client: client.datto_to_incremental(minor))


def dattobd_transition_snapshot(minor: int, cow: StrPath, fallocated_space: int = 0) -> None:
    """From incremental mode to the next snapshot."""
    _do(lambda client: client.datto_to_snapshot(minor, cow, fallocated_space=fallocated_space))


def dattobd_reconfigure(minor: int, cache_size: int) -> None:
    """Bound the memory of the index."""
    _do(lambda client: client.datto_reconfigure(minor, cache_size))


def dattobd_info(minor: int) -> DattobdInfo:
    """What is known of a tracer."""
    with _connected() as client:
        return _info(client.datto_info(minor))


def _info(tracer: Tracer) -> DattobdInfo:
    return DattobdInfo(tracer.minor, tracer.state, tracer.error, tracer.cache_size, tracer.cow_size, tracer.seqid,
                       bytes.fromhex(tracer.uuid) or bytes(16), tracer.cow, tracer.bdev, tracer.version,
                       tracer.changed)


def dattobd_get_free_minor() -> int:
    """The lowest free minor. OSError ENOENT if all are in use."""
    with _connected() as client:
        return client.datto_free_minor()


def dattobd_expand_cow_file(minor: int, size: int) -> None:
    """Give the COW file more MiB."""
    if size < 0:
        raise OSError(EINVAL, "a file cannot grow by less than nothing")
    _do(lambda client: client.datto_expand(minor, size))


def dattobd_reconfigure_auto_expand(minor: int, step_size: int, reserved_space: int = 0) -> None:
    """Let a full COW file grow by itself, in MiB; a step of 0 ends that."""
    _do(lambda client: client.datto_auto_expand(minor, step_size, reserved_space))
