# SPDX-License-Identifier: Apache-2.0
"""What our programs must know of the running kernel: its tracepoints, where fields lie, and numbers of operations."""

from __future__ import annotations

from dataclasses import dataclass

from stasis.errors import UnsupportedError
from stasis.linux import btf
from stasis.linux.btf import Btf, BtfError

__all__ = ["EVENTS", "Event", "KernelTypes", "read"]

EVENTS = ("block_bio_queue", "block_bio_remap", "block_rq_complete", "block_bio_complete")

# include/linux/blk_types.h, enum req_op. The numbers of the zone operations changed in Linux 6.18.
READS = ("REQ_OP_READ", "REQ_OP_FLUSH", "REQ_OP_DRV_IN")
RANGES = ("REQ_OP_WRITE", "REQ_OP_DISCARD", "REQ_OP_SECURE_ERASE", "REQ_OP_WRITE_ZEROES", "REQ_OP_ZONE_APPEND")
OPAQUE = ("REQ_OP_DRV_OUT", "REQ_OP_ZONE_OPEN", "REQ_OP_ZONE_CLOSE", "REQ_OP_ZONE_FINISH", "REQ_OP_ZONE_RESET",
          "REQ_OP_ZONE_RESET_ALL")
OPTIONAL = {"REQ_OP_ZONE_RESET_ALL", "REQ_OP_ZONE_OPEN", "REQ_OP_ZONE_CLOSE", "REQ_OP_ZONE_FINISH",
            "REQ_OP_ZONE_RESET", "REQ_OP_ZONE_APPEND", "REQ_OP_SECURE_ERASE"}
TRACED = "BIO_TRACE_COMPLETION"

# What is read: structure (by the path that leads to its type from an event's argument) and fields.
BIO_FIELDS = ("bi_opf", "bi_flags", "bi_iter", "bi_bdev", "bi_next")
REQUEST_FIELDS = ("cmd_flags", "q", "__sector", "bio")


@dataclass(frozen=True)
class Event:
    """A tracepoint: its type's number in the kernel's BTF, and the index of its bio or request among its arguments."""

    name: str
    target: int
    argument: int


@dataclass(frozen=True)
class KernelTypes:
    """Everything the programs are made from. Offsets are in bytes."""

    events: dict[str, Event]
    offsets: dict[str, int]
    """By "structure.field"."""
    operations: dict[str, int]
    traced_bit: int | None
    """Number of the bit in bi_flags of a bio that block_bio_queue was told of; None if the kernel does not say."""


def read() -> KernelTypes:
    """From the running kernel's BTF. UnsupportedError where something is missing."""
    try:
        types = btf.read_vmlinux()
    except FileNotFoundError as error:
        raise UnsupportedError("this kernel does not describe its types: /sys/kernel/btf/vmlinux is missing",
                               hint="tracking needs a kernel built with CONFIG_DEBUG_INFO_BTF") from error
    return understand(types)


def understand(types: Btf) -> KernelTypes:
    """What the programs need from a kernel's types. UnsupportedError where something is missing."""
    try:
        return _understand(types)
    except BtfError as error:
        raise UnsupportedError(f"this kernel's block layer is not as expected: {error}",
                               hint="stasis track show --capabilities shows what is missing; a newer stasis may know it"
                               ) from error


def _understand(types: Btf) -> KernelTypes:
    events, structures = {}, {}
    for name in EVENTS:
        wanted = "request" if "rq" in name else "bio"
        events[name], structures[wanted] = _event(types, name, wanted)
    bio, request = structures["bio"], structures["request"]
    offsets = {f"bio.{field}": types.field(bio, field).offset for field in BIO_FIELDS}
    iterator = types.field(bio, "bi_iter").type_id
    for name in ("bi_sector", "bi_size"):
        offsets[f"bio.{name}"] = offsets["bio.bi_iter"] + types.field(iterator, name).offset
    offsets |= {f"request.{field}": types.field(request, field).offset for field in REQUEST_FIELDS}
    device = types.pointed(types.field(bio, "bi_bdev").type_id)
    queue = types.pointed(types.field(request, "q").type_id)
    offsets["block_device.bd_disk"] = types.field(device, "bd_disk").offset
    offsets["request_queue.disk"] = types.field(queue, "disk").offset
    disk = types.pointed(types.field(queue, "disk").type_id)
    offsets |= {f"gendisk.{field}": types.field(disk, field).offset for field in ("major", "first_minor")}
    values = types.enumerators(*READS, *RANGES, *OPAQUE, TRACED)
    missing = [name for name in (*READS, *RANGES, *OPAQUE) if name not in values and name not in OPTIONAL]
    if missing:
        raise BtfError(f"there is no {missing[0]}")
    traced = values.pop(TRACED, None)
    return KernelTypes(events, offsets, values, traced)


def _event(types: Btf, name: str, structure: str) -> tuple[Event, int]:
    """A tracepoint, and the type of the structure that it is about."""
    target = types.find(f"btf_trace_{name}")
    for index, parameter in enumerate(types.parameters(target)[1:]):  # the first is the tracepoint's own data
        try:
            pointed = types.pointed(parameter)
        except BtfError:
            continue
        if pointed and types.name(pointed) == structure:
            return Event(name, target, index), pointed
    raise BtfError(f"{name} tells of no {structure}")
