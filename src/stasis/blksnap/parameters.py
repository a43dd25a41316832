# SPDX-License-Identifier: Apache-2.0
"""blksnap's module parameters: all their names, how they are written down, and what the module makes of bad ones.

The module corrects its parameters when it is loaded, and says nothing. Here the same corrections are made, and told.
Sizes have the module's units: shifts are powers of two of bytes, `diff_storage_minimum` is in sectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stasis.errors import NotFoundError, PermissionDeniedError, UsageError

__all__ = ["DEFAULTS", "UNUSED", "Correction", "Parameters", "correct", "load", "parse"]

PAGE_SHIFT = 12
SECTOR = 512
HIGHEST = (1 << 32) - 1
HIGHEST_COUNT_SHIFT = 40
MODULES = ("blksnap", "veeamblksnap")

DEFAULTS = {
    "tracking_block_minimum_shift": 16,
    "tracking_block_maximum_count": 2097152,
    "tracking_block_maximum_shift": 26,
    "chunk_minimum_shift": 18,
    "chunk_maximum_count": 2097152,
    "chunk_maximum_count_shift": 40,
    "chunk_maximum_shift": 26,
    "chunk_maximum_in_cache": 32,
    "chunk_maximum_in_queue": 256,
    "free_diff_buffer_pool_size": 128,
    "diff_storage_minimum": 2097152,
}
"""All parameters of all generations with the module's defaults."""

UNUSED = {
    "chunk_maximum_in_cache": "stasis keeps no chunks in memory",
    "chunk_maximum_in_queue": "stasis has no queue of chunks: a write waits until its chunks are stored",
    "free_diff_buffer_pool_size": "stasis needs no buffers per chunk",
}
"""Parameters of what stasis does not have, and why."""


@dataclass(frozen=True)
class Correction:
    """A parameter that makes no sense as it was given, and what is used instead."""

    name: str
    given: int
    used: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name}={self.given} is taken as {self.used}: {self.reason}"


@dataclass(frozen=True)
class Parameters:
    """Corrected parameters: `given` are the names that were set, `values` all of them."""

    given: tuple[str, ...]
    values: Mapping[str, int]
    corrections: list[Correction] = field(default_factory=list)

    @property
    def unused(self) -> dict[str, str]:
        """Those of `given` that mean nothing here, and why."""
        return {name: reason for name, reason in UNUSED.items() if name in self.given}

    def as_settings(self) -> dict[str, int]:
        """What they mean as settings of stasis (sizes in bytes): those that were given, or corrected for others."""
        changed = {*self.given, *(one.name for one in self.corrections)} - set(UNUSED)
        settings = {name: self.values[name] for name in DEFAULTS if name in changed}
        if "diff_storage_minimum" in settings:
            settings["diff_storage_minimum"] *= SECTOR
        count = settings.pop("chunk_maximum_count", None)
        if count is not None:  # the module's older way of saying it
            settings.setdefault("chunk_maximum_count_shift", max(1, count.bit_length() - 1))
        return settings


def parse(text: str, source: str = "the settings") -> dict[str, int]:
    """Parameters of a file with lines of NAME=VALUE, or of modprobe.d's `options blksnap NAME=VALUE ...`.

    `#` begins a comment, options of other modules are left out; a later value replaces an earlier one. UsageError
    names the line.
    """
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if words[:1] == ["options"]:
            words = words[2:] if words[1:2] and words[1] in MODULES else []
        for word in words:
            name, separator, value = word.partition("=")
            if not separator:
                raise UsageError(f"line {number} of {source} is no setting: {word!r}", hint="write NAME=NUMBER")
            found[name] = _number(name, value, f"line {number} of {source}")
    return found


def _number(name: str, value: str, where: str) -> int:
    """As the kernel reads an unsigned parameter: decimal, 0x hexadecimal, 0 octal."""
    if name not in DEFAULTS:
        raise UsageError(f"{where}: blksnap has no parameter {name}", hint=f"parameters: {', '.join(DEFAULTS)}")
    text = value.strip().removeprefix("+").strip('"')
    try:
        number = int(text, 8) if re.fullmatch(r"0[0-7]+", text) else int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= HIGHEST:
        raise UsageError(f"{where}: {name} is {value!r}", hint="write a whole number from 0 to 4294967295")
    return number


def load(path: Path) -> dict[str, int]:
    """Parameters of a file as `parse` takes it, or of a directory such as /sys/module/blksnap/parameters."""
    try:
        if path.is_dir():
            return {entry.name: _number(entry.name, entry.read_text(), str(path)) for entry in sorted(path.iterdir())}
        return parse(path.read_text(), str(path))
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", hint="name a file of NAME=NUMBER lines") from None
    except PermissionError as error:
        raise PermissionDeniedError(f"no permission to read {path}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def correct(given: Mapping[str, int]) -> Parameters:
    """What the module makes of parameters when it is loaded, in its own order (the patch set for Linux 6.15)."""
    values = {**DEFAULTS, **given}
    corrections: list[Correction] = []

    def use(name: str, value: int, reason: str) -> None:
        if values[name] != value:
            corrections.append(Correction(name, values[name], value, reason))
            values[name] = value

    if values["tracking_block_maximum_shift"] < values["tracking_block_minimum_shift"]:
        use("tracking_block_maximum_shift", values["tracking_block_minimum_shift"], "it was below the minimum")
    if values["chunk_minimum_shift"] > values["chunk_maximum_shift"]:
        use("chunk_minimum_shift", values["chunk_maximum_shift"], "it was above the maximum")
    if values["chunk_minimum_shift"] < PAGE_SHIFT:
        use("chunk_minimum_shift", PAGE_SHIFT, "a chunk is a page at least")
    if values["chunk_maximum_shift"] < values["chunk_minimum_shift"]:  # the module leaves it so
        use("chunk_maximum_shift", values["chunk_minimum_shift"], "it was below the minimum")
    _correct_storage(values, use)
    if values["chunk_maximum_count_shift"] > HIGHEST_COUNT_SHIFT:
        use("chunk_maximum_count_shift", HIGHEST_COUNT_SHIFT, "more chunks cannot be counted")
    return Parameters(tuple(given), values, corrections)


def _correct_storage(values: dict[str, int], use: Callable[[str, int, str], None]) -> None:
    chunk = (1 << values["chunk_minimum_shift"]) // SECTOR
    if values["diff_storage_minimum"] < 2 * chunk:
        use("diff_storage_minimum", 2 * chunk, "a portion holds two of the smallest chunks at least")
    rounded = values["diff_storage_minimum"] // chunk * chunk
    use("diff_storage_minimum", rounded, "a portion is a multiple of the smallest chunk")
