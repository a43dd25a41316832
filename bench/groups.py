# SPDX-License-Identifier: Apache-2.0
"""Groups of rows that share a set-up, and how contestants take turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lab import Lab
from report import Row

__all__ = ["GROUPS", "Bench", "Contestant", "Group", "alternate", "group"]

# One measurement of a contestant in a round: a rate, more is better.
Contestant = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Bench:
    """What a group gets: the lab, how many rounds of how many seconds, and sizes in bytes."""

    lab: Lab
    rounds: int
    seconds: float
    image_size: int
    quick: bool
    project: Path


@dataclass(frozen=True, slots=True)
class Group:
    """A function that yields rows, with the names they will have. A suite is what one `make bench…` measures."""

    name: str
    rows: tuple[str, ...]
    tools: tuple[str, ...]
    needs_root: bool
    suite: str
    measure: Callable[[Bench], list[Row]]


GROUPS: dict[str, Group] = {}


def group(
    *rows: str, tools: tuple[str, ...] = (), needs_root: bool = False, suite: str = "block"
) -> Callable[[Callable[[Bench], list[Row]]], Callable[[Bench], list[Row]]]:
    """Register a function that measures the named rows."""

    def register(measure: Callable[[Bench], list[Row]]) -> Callable[[Bench], list[Row]]:
        GROUPS[measure.__name__] = Group(measure.__name__, rows, tools, needs_root, suite, measure)
        return measure

    return register


def alternate(bench: Bench, contestants: Mapping[str, Contestant]) -> dict[str, list[float]]:
    """Let contestants take turns for all rounds, each round in the opposite order of the one before.

    What drifts on the machine (heat, neighbours, caches) then meets all of them alike.
    """
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(bench.rounds):
        names = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in names:
            os.sync()  # nobody pays for what another one has left to be written back
            figures[name].append(contestants[name](number))
    return figures
