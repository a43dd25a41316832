# SPDX-License-Identifier: Apache-2.0
"""dattobd in user space: its COW file, its tracer, and the eleven calls of libdattobd.

    from stasis import datto

    minor = datto.dattobd_get_free_minor()
    datto.dattobd_setup_snapshot(minor, "/dev/sdb1", "/var/tmp/cow0", 0, 0)
    print(datto.dattobd_info(minor).state)

The calls are those of `stasis.daemon.libdattobd`, which this room does not depend on: they are found when used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `update-img` would wait longer for typing than for anything else it loads
if TYPE_CHECKING:
    from typing import Any

_CALLS = (
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
)


def __getattr__(name: str) -> Any:
    if name in _CALLS:
        import importlib

        return getattr(importlib.import_module("stasis.daemon.libdattobd"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_CALLS)
