# SPDX-License-Identifier: Apache-2.0
"""Sources that need no daemon: image files, block devices, standard input, and anything behind NBD."""

from stasis.backup.sources.nbd import ExplainedReader, NbdReader, nbd_zero_extents
from stasis.backup.sources.raw import RawSource
from stasis.backup.sources.stream import StreamSource

__all__ = ["ExplainedReader", "NbdReader", "RawSource", "StreamSource", "nbd_zero_extents"]
