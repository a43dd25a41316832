# SPDX-License-Identifier: Apache-2.0
"""The binary interfaces of the blksnap and dattobd kernel modules: ioctl numbers and structures, nothing else.

`current` is blksnap as of its patch set for Linux 6.15, `v7` that of v6 and v7 (and of stable-v2.0), `v5` that of v3 to
v5, `v2` that of v1 and v2 (and of stable-v1.0), `val7` that of the out-of-tree module of Veeam Agent 7; `dattobd` is
dattobd from 0.10.7 on. `common` holds what the generations of blksnap share. The layouts are those of a 64-bit machine;
no module translates calls of 32-bit programs. docs/formats/kernel-modules.md has them byte by byte.
"""

from __future__ import annotations

from stasis.blksnap.uapi import common, current, dattobd, v2, v5, v7, val7

__all__ = ["common", "current", "dattobd", "v2", "v5", "v7", "val7"]
