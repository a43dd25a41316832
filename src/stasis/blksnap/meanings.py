# SPDX-License-Identifier: Apache-2.0
"""What the errnos of the modules mean, call by call; one table for messages, exit codes and documentation.

From the modules' own code (docs/formats/kernel-modules.md). An errno that is not in the table keeps its own text.
"""

from __future__ import annotations

import errno as e
import os
from dataclasses import dataclass

from stasis.errors import (
    BusyError,
    GenerationError,
    NotFoundError,
    PermissionDeniedError,
    StasisError,
    StateError,
    StorageError,
    UnsupportedError,
    UsageError,
)

__all__ = ["MEANINGS", "Meaning", "driver_error"]


@dataclass(frozen=True)
class Meaning:
    """One errno of one call: `text` completes a sentence that begins with what was asked of what."""

    kind: type[StasisError]
    text: str
    hint: str = ""


_GONE = Meaning(NotFoundError, "the device is gone")
_NO_SNAPSHOT = Meaning(NotFoundError, "the module knows no such snapshot", "stasis snapshot list shows them")
_NO_MEMORY = Meaning(StasisError, "the kernel has no memory left for it")
_OTHER_GENERATION = Meaning(UnsupportedError, "the module does not know this request",
                            "tool and module are of different generations")
_ELSEWHERE = "name a directory with room, an empty file or an unused block device, on another disk"
_DATTO_NUMBERS = "see /proc/datto-info for the devices it has"

MEANINGS: dict[str, dict[int, Meaning]] = {
    "attach": {
        e.ENOENT: Meaning(UnsupportedError, "the kernel has no filter of this name", "modprobe blksnap"),
        e.ENODEV: _GONE,
        e.EBUSY: Meaning(BusyError, "another filter is attached", "cat /sys/block/DISK/filter names it"),
        e.ENOMEM: _NO_MEMORY,
        e.ENOTTY: _OTHER_GENERATION,
    },
    "detach": {
        e.ENODEV: _GONE,
        e.ENOENT: Meaning(NotFoundError, "no filter is attached"),
        e.EINVAL: Meaning(BusyError, "another filter is attached", "cat /sys/block/DISK/filter names it"),
        e.ENOTTY: _OTHER_GENERATION,
    },
    "cbtinfo": {
        e.ENODEV: _GONE,
        e.ENOENT: Meaning(NotFoundError, "no filter is attached", "attach it again"),
        e.EINVAL: Meaning(BusyError, "another filter is attached", "cat /sys/block/DISK/filter names it"),
        e.ESRCH: Meaning(StateError, "the module has no change map of it", "detach it and attach it again"),
        e.ENOTTY: _OTHER_GENERATION,
    },
    "cbtmap": {
        e.ENODEV: _GONE,
        e.ENOENT: Meaning(NotFoundError, "no filter is attached", "attach it again"),
        e.ESRCH: Meaning(StateError, "the module has no change map of it", "detach it and attach it again"),
        e.EFAULT: Meaning(GenerationError, "the module's change map is corrupted, most likely by a resize",
                          "the next snapshot starts a new generation: make a full copy"),
        e.ENODATA: Meaning(UsageError, "the range lies outside of the change map"),
    },
    "cbtdirty": {
        e.ENODEV: _GONE,
        e.ENOENT: Meaning(NotFoundError, "no filter is attached", "attach it again"),
        e.ESRCH: Meaning(StateError, "the module has no change map of it", "detach it and attach it again"),
        e.EINVAL: Meaning(UsageError, "a range lies outside of the change map, or the map is corrupted",
                          "ranges before it were marked; marking again does no harm"),
    },
    "add": {
        e.ENODEV: _GONE,
        e.ENOENT: Meaning(NotFoundError, "no filter is attached", "stasis device attach --driver blksnap"),
        e.ESRCH: _NO_SNAPSHOT,
        e.EPERM: Meaning(UnsupportedError, "the device has a data-integrity or inline-encryption profile",
                         "the module cannot copy such data; back it up from above, by its file system"),
        e.EALREADY: Meaning(BusyError, "it is in this snapshot already"),
        e.EBUSY: Meaning(BusyError, "it is in another snapshot", "a device is in one snapshot at most"),
    },
    "info": {
        e.ENODEV: _GONE,
        e.ENOENT: Meaning(NotFoundError, "no filter is attached", "attach it again"),
    },
    "create": {
        e.ENOENT: Meaning(NotFoundError, "the difference storage does not exist", _ELSEWHERE),
        e.EACCES: Meaning(PermissionDeniedError, "the difference storage cannot be opened", _ELSEWHERE),
        e.EBUSY: Meaning(BusyError, "the difference storage is in use", _ELSEWHERE),
        e.EINVAL: Meaning(StorageError, "the difference storage is no directory, file or block device", _ELSEWHERE),
        e.ENOSPC: Meaning(StorageError, "the difference storage is larger than its limit, or the disk is full",
                          "raise --limit, or name an empty file"),
        e.EOPNOTSUPP: Meaning(StorageError, "this file system has no unnamed files, or cannot reserve space",
                              _ELSEWHERE),
        e.ENOMEM: _NO_MEMORY,
    },
    "append": {
        e.ESRCH: _NO_SNAPSHOT,
        e.EINVAL: Meaning(StorageError, "the module does not take this as difference storage", _ELSEWHERE),
        e.ENODEV: Meaning(StorageError, "the module cannot open the device of the difference storage", _ELSEWHERE),
    },
    "destroy": {e.ENODEV: _NO_SNAPSHOT, e.ESRCH: _NO_SNAPSHOT},
    "take": {
        e.ESRCH: _NO_SNAPSHOT,
        e.EALREADY: Meaning(StateError, "it is already taken"),
        e.ENODEV: Meaning(StateError, "it has no devices", "stasis snapshot add UUID DEVICE"),
        e.EFAULT: Meaning(StorageError, "the image of a device was lost at once: storage, or chunk size",
                          "give more with --limit; the kernel's log has more"),
        e.ENOMEM: _NO_MEMORY,
    },
    "collect": {},
    "wait": {e.ESRCH: _NO_SNAPSHOT},
    "version": {e.ENOTTY: _OTHER_GENERATION},
    # dattobd
    "setup": {
        e.EBUSY: Meaning(BusyError, "this minor number is in use", _DATTO_NUMBERS),
        e.ENOENT: Meaning(NotFoundError, "the device or the directory of the COW file does not exist"),
        e.ENOTBLK: Meaning(UsageError, "it is no block device"),
        e.EINVAL: Meaning(UsageError, "it is not mounted for writing, traced already, or the COW file lies elsewhere",
                          "dattobd protects a mounted file system and keeps its COW file on it"),
        e.EISDIR: Meaning(UsageError, "the COW file is a directory"),
        e.ENOSPC: Meaning(StorageError, "the file system has no room for the COW file", "give less with --limit"),
        e.EFBIG: Meaning(StorageError, "the file system takes no file of this size", "give less with --limit"),
        e.ENOMEM: _NO_MEMORY,
    },
    "datto-destroy": {
        e.ENOENT: Meaning(NotFoundError, "the module has no such device", _DATTO_NUMBERS),
        e.EBUSY: Meaning(BusyError, "its image is open", "unmount it or stop who reads it"),
    },
    "incremental": {
        e.ENOENT: Meaning(NotFoundError, "the module has no such device", _DATTO_NUMBERS),
        e.EBUSY: Meaning(BusyError, "its image is open", "unmount it or stop who reads it"),
        e.EINVAL: Meaning(StateError, "it is no active snapshot, or has failed", _DATTO_NUMBERS),
        e.EFBIG: Meaning(StorageError, "the COW file is full; the device has failed",
                         "detach it, and attach it again with more room"),
    },
    "snapshot": {
        e.ENOENT: Meaning(NotFoundError, "the module has no such device, or the COW file's directory does not exist",
                          _DATTO_NUMBERS),
        e.EBUSY: Meaning(BusyError, "its image is open", "unmount it or stop who reads it"),
        e.EINVAL: Meaning(StateError, "it is not tracking, has failed, or the COW file lies elsewhere", _DATTO_NUMBERS),
        e.ENOSPC: Meaning(StorageError, "the file system has no room for the COW file", "give less with --limit"),
    },
    "datto-info": {e.ENOENT: Meaning(NotFoundError, "the module has no such device", _DATTO_NUMBERS)},
    "free": {e.ENOENT: Meaning(BusyError, "the module has no free device", "raise its parameter max_snap_devices")},
}


def driver_error(driver: str, call: str, subject: str, error: OSError) -> StasisError:
    """The error as users see it: which module, what of what, and what the module means by this errno."""
    number = error.errno or 0
    meaning = MEANINGS[call].get(number, Meaning(StasisError, os.strerror(number)))
    verb = call.removeprefix("datto-")
    return meaning.kind(f"{driver} refuses {verb} of {subject}: {meaning.text}", hint=meaning.hint, errno=number)
