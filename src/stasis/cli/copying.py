# SPDX-License-Identifier: Apache-2.0
"""`stasis snapshot copy`: copy an image to a file or block device, with a progress bar."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stasis.cli.backup.reporting import report
from stasis.cli.options import add_command, connect, percentage
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.block.copy import CopyResult
    from stasis.cli.options import Groups

__all__ = ["add"]


def add(group: Groups) -> None:
    """Add the command to `stasis snapshot`."""
    command = add_command(group, "copy", copy, "Copy an image, whole or only what changed, to a file or block device.",
                          """
stasis snapshot copy 6f1c2a7e disk.img backup.img
stasis snapshot copy 6f1c2a7e disk.img backup.img --since 3 --verify
""")
    command.add_argument("uuid", metavar="UUID", help="the snapshot's UUID, or the beginning of it")
    command.add_argument("device", metavar="DEVICE", help="which of its devices")
    command.add_argument("target", metavar="TARGET", help="the file or block device to write")
    command.add_argument("--since", metavar="N", type=int,
                         help="copy only what changed since this change number, onto a copy of that snapshot")
    command.add_argument("--generation", metavar="UUID", help="the generation that the number of --since belongs to")
    command.add_argument("--verify", action="store_true", help="read the copy back and compare")
    command.add_argument("--sample", metavar="PERCENT", type=percentage, default=0.1,
                         help="share of the blocks that did not change to compare before an incremental copy (0.1)")
    command.add_argument("--sample-seed", metavar="N", type=int, help="draw the sample that an earlier run named")


def copy(arguments: argparse.Namespace) -> None:
    """stasis snapshot copy"""
    from stasis.block.copy import CopyOptions

    options = CopyOptions(verify=arguments.verify, sample_share=arguments.sample / 100,
                          sample_seed=arguments.sample_seed)
    with report(arguments) as reporter:
        with connect(arguments) as client:
            reporter.progress.phase("copying")
            result = client.copy(arguments.uuid, arguments.device, arguments.target, since=arguments.since,
                                 generation=arguments.generation, options=options, progress=reporter.progress)
        reporter.finish(result.as_dict(), _text(result))


def _text(result: CopyResult) -> str:
    rate = format_size(int((result.bytes_copied + result.bytes_zeroed) / max(result.seconds, 1e-9)))
    copied, zeroed = format_size(result.bytes_copied), format_size(result.bytes_zeroed)
    lines = [f"copied {copied} and {zeroed} of zeroes to {result.target} in {result.seconds:.1f} s ({rate}/s)"]
    if result.position_at_start:
        lines.append(f"continued at {format_size(result.position_at_start)}, where an earlier copy stopped")
    if result.bytes_verified:
        lines.append(f"read back {format_size(result.bytes_verified)}: equal")
    if result.blocks_sampled:
        lines.append(f"compared {result.blocks_sampled} blocks that did not change: equal")
    return "\n".join(lines)
