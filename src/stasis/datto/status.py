# SPDX-License-Identifier: Apache-2.0
"""The status file, with the keys of dattobd's /proc/datto-info in their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stasis.datto.registry import MIB, TracerRecord

__all__ = ["MODULE_VERSION", "status"]

MODULE_VERSION = "0.12.1"
"""The version of dattobd whose behaviour this is."""


def status(records: Iterable[TracerRecord]) -> dict[str, Any]:
    """The whole document. Keys that do not apply are left out, as the module leaves them out."""
    ordered = sorted(records, key=lambda record: record.minor)
    return {"version": MODULE_VERSION, "devices": [_device(record) for record in ordered]}


def _device(record: TracerRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"minor": record.minor, "cow_file": record.cow, "block_device": record.bdev,
                              "max_cache": record.cache_size}
    if not record.state.is_unverified:
        fields["fallocate"] = record.fallocated * MIB
        if record.uuid:
            fields |= {"cow_size_current": record.cow_size, "seq_id": record.seqid, "uuid": record.uuid}
            if record.version:
                fields |= {"version": record.version, "nr_changed_blocks": record.changed}
            if record.auto_expand:
                step, reserved = record.auto_expand
                fields["auto_expand"] = {"step_size_mib": step, "reserved_space_mib": reserved}
    if record.error:
        fields["error"] = record.error
    fields["state"] = int(record.state)
    return fields
