# SPDX-License-Identifier: Apache-2.0
"""dattobd: one control node, devices by minor number. Requests 10 and 11 came with 0.11.9, 9 with 0.10.10.

An unknown request is EINVAL, not ENOTTY.
"""

from __future__ import annotations

from ctypes import Structure, c_char, c_int, c_uint, c_uint8, c_uint64, c_ulong
from enum import IntFlag

from stasis.linux.ioctl import IOR, IOW

__all__ = [
    "CONTROL_NODE",
    "IOCTL_DATTOBD_INFO",
    "IOCTL_DESTROY",
    "IOCTL_EXPAND_COW_FILE",
    "IOCTL_GET_FREE",
    "IOCTL_RECONFIGURE",
    "IOCTL_RECONFIGURE_AUTO_EXPAND",
    "IOCTL_RELOAD_INC",
    "IOCTL_RELOAD_SNAP",
    "IOCTL_SETUP_SNAP",
    "IOCTL_TRANSITION_INC",
    "IOCTL_TRANSITION_SNAP",
    "ExpandCowFileParams",
    "Info",
    "Minor",
    "ReconfigureAutoExpandParams",
    "ReconfigureParams",
    "ReloadParams",
    "SetupParams",
    "State",
    "TransitionSnapParams",
]

CONTROL_NODE = "datto-ctl"
DATTO = 0x91
PATH_MAX = 4096


class State(IntFlag):
    """Bits of Info.state; a failed device has its error beside them."""

    SNAPSHOT = 1
    ACTIVE = 2
    UNVERIFIED = 4


class Minor(Structure):
    """The number that DESTROY and TRANSITION_INC take, and GET_FREE gives, through a pointer."""

    _fields_ = [("minor", c_uint)]


class SetupParams(Structure):
    """struct setup_params: addresses of two paths, MiB to allocate, bytes of cache (0: the module's defaults)."""

    _fields_ = [
        ("bdev", c_uint64),
        ("cow", c_uint64),
        ("fallocated_space", c_ulong),
        ("cache_size", c_ulong),
        ("minor", c_uint),
    ]


class ReloadParams(Structure):
    """struct reload_params; the path of the COW file begins at the mount point."""

    _fields_ = [("bdev", c_uint64), ("cow", c_uint64), ("cache_size", c_ulong), ("minor", c_uint)]


class TransitionSnapParams(Structure):
    """struct transition_snap_params: MiB, 0 for as much as before."""

    _fields_ = [("cow", c_uint64), ("fallocated_space", c_ulong), ("minor", c_uint)]


class ReconfigureParams(Structure):
    """struct reconfigure_params: bytes of cache."""

    _fields_ = [("cache_size", c_ulong), ("minor", c_uint)]


class ExpandCowFileParams(Structure):
    """struct expand_cow_file_params: MiB to add."""

    _fields_ = [("size", c_uint64), ("minor", c_uint)]


class ReconfigureAutoExpandParams(Structure):
    """struct reconfigure_auto_expand_params: MiB per step, MiB to leave free; 0 steps switch it off."""

    _fields_ = [("step_size", c_uint64), ("reserved_space", c_uint64), ("minor", c_uint)]


class Info(Structure):
    """struct dattobd_info; the caller gives the minor. The last two fields are left alone while unverified."""

    _fields_ = [
        ("minor", c_uint),
        ("state", c_ulong),
        ("error", c_int),
        ("cache_size", c_ulong),
        ("falloc_size", c_uint64),
        ("seqid", c_uint64),
        ("uuid", c_uint8 * 16),
        ("cow", c_char * PATH_MAX),
        ("bdev", c_char * PATH_MAX),
        ("version", c_uint64),
        ("nr_changed_blocks", c_uint64),
    ]


IOCTL_SETUP_SNAP = IOW(DATTO, 1, SetupParams)
IOCTL_RELOAD_SNAP = IOW(DATTO, 2, ReloadParams)
IOCTL_RELOAD_INC = IOW(DATTO, 3, ReloadParams)
IOCTL_DESTROY = IOW(DATTO, 4, Minor)
IOCTL_TRANSITION_INC = IOW(DATTO, 5, Minor)
IOCTL_TRANSITION_SNAP = IOW(DATTO, 6, TransitionSnapParams)
IOCTL_RECONFIGURE = IOW(DATTO, 7, ReconfigureParams)
IOCTL_DATTOBD_INFO = IOR(DATTO, 8, Info)
IOCTL_GET_FREE = IOR(DATTO, 9, Minor)
IOCTL_EXPAND_COW_FILE = IOW(DATTO, 10, ExpandCowFileParams)
IOCTL_RECONFIGURE_AUTO_EXPAND = IOW(DATTO, 11, ReconfigureAutoExpandParams)
