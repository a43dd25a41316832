# SPDX-License-Identifier: Apache-2.0
"""The numbers and structures of the NBD protocol, with the names of its specification.

Source: `doc/proto.md` of the NetworkBlockDevice project (public domain). Server, client and tests share this
one list.
"""

from __future__ import annotations

import errno
import struct

# Handshake magics.
NBD_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
NBD_OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
NBD_REP_MAGIC = 0x0003E889045565A9

# Handshake flags (server) and client flags.
NBD_FLAG_FIXED_NEWSTYLE = 1 << 0
NBD_FLAG_NO_ZEROES = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0
NBD_FLAG_C_NO_ZEROES = 1 << 1

# Transmission flags.
NBD_FLAG_HAS_FLAGS = 1 << 0
NBD_FLAG_READ_ONLY = 1 << 1
NBD_FLAG_SEND_FLUSH = 1 << 2
NBD_FLAG_SEND_FUA = 1 << 3
NBD_FLAG_ROTATIONAL = 1 << 4
NBD_FLAG_SEND_TRIM = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6
NBD_FLAG_SEND_DF = 1 << 7
NBD_FLAG_CAN_MULTI_CONN = 1 << 8
NBD_FLAG_SEND_RESIZE = 1 << 9
NBD_FLAG_SEND_CACHE = 1 << 10
NBD_FLAG_SEND_FAST_ZERO = 1 << 11

# Options.
NBD_OPT_EXPORT_NAME = 1
NBD_OPT_ABORT = 2
NBD_OPT_LIST = 3
NBD_OPT_STARTTLS = 5
NBD_OPT_INFO = 6
NBD_OPT_GO = 7
NBD_OPT_STRUCTURED_REPLY = 8
NBD_OPT_LIST_META_CONTEXT = 9
NBD_OPT_SET_META_CONTEXT = 10
NBD_OPT_EXTENDED_HEADERS = 11

# Option replies.
NBD_REP_ACK = 1
NBD_REP_SERVER = 2
NBD_REP_INFO = 3
NBD_REP_META_CONTEXT = 4
NBD_REP_FLAG_ERROR = 1 << 31
NBD_REP_ERR_UNSUP = NBD_REP_FLAG_ERROR | 1
NBD_REP_ERR_POLICY = NBD_REP_FLAG_ERROR | 2
NBD_REP_ERR_INVALID = NBD_REP_FLAG_ERROR | 3
NBD_REP_ERR_PLATFORM = NBD_REP_FLAG_ERROR | 4
NBD_REP_ERR_TLS_REQD = NBD_REP_FLAG_ERROR | 5
NBD_REP_ERR_UNKNOWN = NBD_REP_FLAG_ERROR | 6
NBD_REP_ERR_SHUTDOWN = NBD_REP_FLAG_ERROR | 7
NBD_REP_ERR_BLOCK_SIZE_REQD = NBD_REP_FLAG_ERROR | 8
NBD_REP_ERR_TOO_BIG = NBD_REP_FLAG_ERROR | 9

# Information items of NBD_OPT_INFO and NBD_OPT_GO.
NBD_INFO_EXPORT = 0
NBD_INFO_NAME = 1
NBD_INFO_DESCRIPTION = 2
NBD_INFO_BLOCK_SIZE = 3

# Requests.
NBD_REQUEST_MAGIC = 0x25609513
NBD_CMD_READ = 0
NBD_CMD_WRITE = 1
NBD_CMD_DISC = 2
NBD_CMD_FLUSH = 3
NBD_CMD_TRIM = 4
NBD_CMD_CACHE = 5
NBD_CMD_WRITE_ZEROES = 6
NBD_CMD_BLOCK_STATUS = 7

NBD_CMD_FLAG_FUA = 1 << 0
NBD_CMD_FLAG_NO_HOLE = 1 << 1
NBD_CMD_FLAG_DF = 1 << 2
NBD_CMD_FLAG_REQ_ONE = 1 << 3
NBD_CMD_FLAG_FAST_ZERO = 1 << 4

# Replies.
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
NBD_REPLY_FLAG_DONE = 1 << 0
NBD_REPLY_TYPE_NONE = 0
NBD_REPLY_TYPE_OFFSET_DATA = 1
NBD_REPLY_TYPE_OFFSET_HOLE = 2
NBD_REPLY_TYPE_BLOCK_STATUS = 5
NBD_REPLY_TYPE_FLAG_ERROR = 1 << 15
NBD_REPLY_TYPE_ERROR = NBD_REPLY_TYPE_FLAG_ERROR | 1
NBD_REPLY_TYPE_ERROR_OFFSET = NBD_REPLY_TYPE_FLAG_ERROR | 2

# Flags of the base:allocation context; of qemu:dirty-bitmap:NAME (qemu's docs/interop/nbd.txt).
NBD_STATE_HOLE = 1 << 0
NBD_STATE_ZERO = 1 << 1
NBD_STATE_DIRTY = 1 << 0

BASE_ALLOCATION = "base:allocation"
QEMU_DIRTY_BITMAP = "qemu:dirty-bitmap:"
QEMU_ALLOCATION_DEPTH = "qemu:allocation-depth"

NBD_MAX_STRING = 4096
"""Longest export name, context query, or human-readable text, in bytes of UTF-8 (proto.md, "Values")."""

GREETING = struct.Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
"""IHAVEOPT, option, length of the data that follows."""
OPTION_REPLY = struct.Struct(">QIII")
"""reply magic, option, reply type, length of the data that follows."""
EXPORT_NAME_REPLY = struct.Struct(">QH")
"""size in bytes, transmission flags; 124 zero bytes follow unless both sides said NO_ZEROES."""
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
"""information type, minimum, preferred, maximum block size in bytes."""
REQUEST = struct.Struct(">IHHQQI")
"""magic, command flags, type, cookie, offset, length (bytes)."""
SIMPLE_REPLY = struct.Struct(">IIQ")
"""magic, error, cookie."""
CHUNK = struct.Struct(">IHHQI")
"""magic, flags, type, cookie, length of the payload that follows."""
DATA_CHUNK = struct.Struct(">IHHQIQ")
"""A chunk header together with the offset that begins the payload of OFFSET_DATA."""
HOLE_CHUNK = struct.Struct(">IHHQIQI")
ERROR_CHUNK = struct.Struct(">IHHQIIH")
EXTENT = struct.Struct(">II")
"""length in bytes, status flags."""

NBD_ERRORS = frozenset(
    {
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    }
)
_SAME_AS = {
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EACCES: errno.EPERM,
    errno.EROFS: errno.EPERM,
}


def error_number(number: int | None) -> int:
    """The protocol's error value for an errno (proto.md, "Error values"); what it has no value for is EIO."""
    if number is None:
        return errno.EIO
    number = _SAME_AS.get(number, number)
    return number if number in NBD_ERRORS else errno.EIO
