# SPDX-License-Identifier: Apache-2.0
"""Loop devices (include/uapi/linux/loop.h)."""

import ctypes
import errno
import os
from pathlib import Path

from stasis.linux import ioctl, libc

__all__ = ["attach", "detach", "file_system_of", "is_attached"]

LOOP_CLR_FD = 0x4C01
LOOP_GET_STATUS64 = 0x4C05
LOOP_CONFIGURE = 0x4C0A  # since Linux 5.8
LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_PARTSCAN = 8
LO_FLAGS_DIRECT_IO = 16
LO_NAME_SIZE = 64
LO_KEY_SIZE = 32

CONTROL = "/dev/loop-control"
ATTEMPTS = 64  # another program may take the free device that we were told of


class LoopInfo64(ctypes.Structure):
    """struct loop_info64."""

    _fields_ = [
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_crypt_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_encrypt_key", ctypes.c_uint8 * LO_KEY_SIZE),
        ("lo_init", ctypes.c_uint64 * 2),
    ]


class LoopConfig(ctypes.Structure):
    """struct loop_config."""

    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", LoopInfo64),
        ("reserved", ctypes.c_uint64 * 8),
    ]


def attach(path: str, sector: int, size: int, *, read_only: bool = False, direct: bool = False) -> str:
    """Make a loop device of the first size bytes of a file, in sectors of that many bytes; returns its node.

    Partitions are scanned. Raises OSError: EPERM, ENOENT for a kernel without loop devices, EBUSY if others take
    each free device first.
    """
    flags = LO_FLAGS_PARTSCAN | (read_only and LO_FLAGS_READ_ONLY) | (direct and LO_FLAGS_DIRECT_IO)
    name = os.fsencode(path)[: LO_NAME_SIZE - 1]
    info = LoopInfo64(lo_flags=flags, lo_file_name=name, lo_sizelimit=size)
    backing = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    config = bytearray(LoopConfig(backing, sector, info))
    try:
        for _ in range(ATTEMPTS):
            node = _free()
            if _configure(node, config):
                return node
    finally:
        os.close(backing)
    raise libc.error(errno.EBUSY, "LOOP_CONFIGURE", path)


def _free() -> str:
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return f"/dev/loop{ioctl.call(control, 'LOOP_CTL_GET_FREE', LOOP_CTL_GET_FREE)}"
    finally:
        os.close(control)


def _configure(node: str, config: bytearray) -> bool:
    """False if another program was faster."""
    device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl.call(device, "LOOP_CONFIGURE", LOOP_CONFIGURE, config)
    except OSError as e:
        if e.errno == errno.EBUSY:
            return False
        raise
    finally:
        os.close(device)
    return True


def detach(node: str) -> None:
    """Take the device off its file. A device in use goes only when its last user closes it. ENXIO if it has none."""
    device = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ioctl.call(device, "LOOP_CLR_FD", LOOP_CLR_FD)
    finally:
        os.close(device)


def file_system_of(node: str) -> int:
    """The st_dev of the file behind a loop device, whatever namespace it was opened in and whether it has a name.

    ENXIO: it has none. Asks the file's own file system, which may wait for a server.
    """
    info = bytearray(LoopInfo64())
    device = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ioctl.call(device, "LOOP_GET_STATUS64", LOOP_GET_STATUS64, info)
    finally:
        os.close(device)
    return int(LoopInfo64.from_buffer(info).lo_device)


def is_attached(node: str, path: str) -> bool:
    """Whether the device has the file of this path. The file itself is not touched: its server may be dead."""
    # Not LOOP_GET_STATUS64: it keeps 63 bytes of the path.
    try:
        backing = Path(f"/sys/block/{os.path.basename(node)}/loop/backing_file").read_text()
    except OSError:
        return False
    # A file whose FUSE server died is shown as deleted.
    shown = backing.removesuffix("\n").removesuffix(" (deleted)")
    return shown == os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
