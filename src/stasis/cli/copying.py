# SPDX-License-Identifier: Apache-2.0
"""`stasis snapshot copy`: copy an image to a file or block device, with a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stasis.cli.options import add_command, connect
from stasis.errors import UsageError
from stasis.units import format_size

if TYPE_CHECKING:
    from stasis.block.copy import CopyResult, Progress
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


def percentage(text: str) -> float:
    """A number from 0 to 100, with or without a percent sign."""
    try:
        value = float(text.rstrip("%"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no percentage", hint="write a number from 0 to 100, as in 0.1") from error
    if not 0 <= value <= 100:
        raise UsageError(f"{text!r} is no percentage", hint="write a number from 0 to 100, as in 0.1")
    return value


def copy(arguments: argparse.Namespace) -> None:
    """stasis snapshot copy"""
    from stasis.block.copy import CopyOptions, JsonLines

    options = CopyOptions(verify=arguments.verify, sample_share=arguments.sample / 100,
                          sample_seed=arguments.sample_seed)
    lines = JsonLines(sys.stdout) if arguments.json else None
    with connect(arguments) as client, _progress(lines) as progress:
        result = client.copy(arguments.uuid, arguments.device, arguments.target, since=arguments.since,
                             generation=arguments.generation, options=options, progress=progress)
    if lines is not None:
        lines.write(**result.as_dict())
    else:
        _print(result)


@contextlib.contextmanager
def _progress(lines: Progress | None) -> Iterator[Progress | None]:
    """JSON lines if asked for, a bar on a terminal, nothing elsewhere."""
    if lines is not None or not sys.stderr.isatty():
        yield lines
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _print(result: CopyResult) -> None:
    rate = (result.bytes_copied + result.bytes_zeroed) / max(result.seconds, 1e-9)
    copied, zeroed = format_size(result.bytes_copied), format_size(result.bytes_zeroed)
    print(f"copied {copied} and {zeroed} of zeroes to {result.target} in {result.seconds:.1f} s "
          f"({format_size(int(rate))}/s)")
    if result.position_at_start:
        print(f"continued at {format_size(result.position_at_start)}, where an earlier copy stopped")
    if result.bytes_verified:
        print(f"read back {format_size(result.bytes_verified)}: equal")
    if result.blocks_sampled:
        print(f"compared {result.blocks_sampled} blocks that did not change: equal")
