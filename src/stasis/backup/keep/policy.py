# SPDX-License-Identifier: Apache-2.0
"""Which backups to keep: restic's rules, as a function of the backups and nothing else.

Backups are grouped, and each group is gone through from its newest backup to its oldest. A backup stays if any rule
wants it. The two differences to restic lose nothing: the newest backup of a device always stays, and a backup from the
future (a clock was wrong) stays and does not move the reference point of `within`.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Protocol

from stasis.errors import UsageError

__all__ = ["ALL", "Dated", "Decision", "Duration", "KeepPolicy", "decide", "group_backups", "parse_time"]

ALL = -1
"""Instead of a number: as many as there are."""

_DURATION = re.compile(r"(?:(\d{1,6})y)?(?:(\d{1,6})m)?(?:(\d{1,6})w)?(?:(\d{1,6})d)?(?:(\d{1,6})h)?", re.ASCII)
GROUP_FIELDS = ("host", "device", "tags", "set")


class Dated(Protocol):
    """What the rules look at; a manifest has it."""

    @property
    def id(self) -> str: ...
    @property
    def set_id(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def time(self) -> str: ...
    @property
    def tags(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Duration:
    """A span of calendar time: years and months are as long as the calendar says."""

    months: int = 0
    hours: int = 0

    @classmethod
    def parse(cls, text: str) -> Duration:
        """`1y6m`, `2w`, `7d12h`: years, months, weeks, days and hours, in this order. Raises UsageError."""
        match = _DURATION.fullmatch(text.strip())
        if match is None or not text.strip():
            raise UsageError(f"{text[:80]!r} is no duration",
                             hint="Write years, months, weeks, days and hours, as in 1y6m or 2w or 7d12h.")
        years, months, weeks, days, hours = (int(group or 0) for group in match.groups())
        return cls(12 * years + months, hours + 24 * (days + 7 * weeks))

    def before(self, moment: datetime) -> datetime:
        """The moment this long before another; the last day of a month that is too short for it."""
        count = moment.year * 12 + moment.month - 1 - self.months
        year, month = divmod(count, 12)
        if year < 1:
            return datetime.min.replace(tzinfo=UTC)
        day = min(moment.day, calendar.monthrange(year, month + 1)[1])
        try:
            return moment.replace(year=year, month=month + 1, day=day) - timedelta(hours=self.hours)
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class KeepPolicy:
    """How many backups each rule keeps: a number, ALL, or 0 for a rule that is not used.

    within: keep all that are at most this much older than the newest. tags: keep what has all tags of any of these.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration | None = None
    tags: tuple[frozenset[str], ...] = ()

    @property
    def is_empty(self) -> bool:
        """No rule at all: nothing would be kept on purpose."""
        return not any(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one backup: it stays for these reasons, or goes if there are none."""

    backup: Dated
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        return bool(self.reasons)


def parse_time(text: str) -> datetime:
    """The moment of a manifest's time field."""
    return datetime.fromisoformat(text)


def group_backups(backups: Iterable[Dated], by: Sequence[str]) -> dict[tuple[str, ...], list[Dated]]:
    """Backups by the named fields, groups and backups in the order in which they come."""
    unknown = [name for name in by if name not in GROUP_FIELDS]
    if unknown:
        raise UsageError(f"backups cannot be grouped by {unknown[0]!r}",
                         hint="Group by host, device, tags or set, with commas between.")
    groups: dict[tuple[str, ...], list[Dated]] = {}
    for backup in backups:
        groups.setdefault(tuple(_group_key(backup, name) for name in by), []).append(backup)
    return groups


def _group_key(backup: Dated, name: str) -> str:
    if name == "tags":
        return ",".join(sorted(backup.tags))
    return backup.set_id if name == "set" else str(getattr(backup, name))


def decide(backups: Sequence[Dated], policy: KeepPolicy, newest: frozenset[str], now: datetime,
           zone: tzinfo | None = None) -> list[Decision]:
    """Apply the policy to one group; decisions come newest first.

    newest: ids of the newest backup of each device, which stay in any case. now: backups from after it are kept.
    zone: where hours and days begin; None is the time zone of this host.
    """
    ordered = sorted(backups, key=lambda backup: (parse_time(backup.time), backup.id), reverse=True)
    past = [backup for backup in ordered if parse_time(backup.time) <= now]
    buckets = _buckets(policy, zone)
    horizon = policy.within.before(parse_time(past[0].time)) if policy.within and past else None
    decisions = [Decision(backup, ("time in the future",)) for backup in ordered if parse_time(backup.time) > now]
    for backup in past:
        reasons = _tag_reasons(backup, policy)
        if horizon is not None and parse_time(backup.time) > horizon:
            reasons.append("within")
        reasons += [reason for bucket in buckets if (reason := bucket.take(backup, backup is past[-1]))]
        if not reasons and backup.id in newest:
            reasons.append("newest of its device")
        decisions.append(Decision(backup, tuple(reasons)))
    return decisions


def _tag_reasons(backup: Dated, policy: KeepPolicy) -> list[str]:
    return ["tag " + ",".join(sorted(tags)) for tags in policy.tags if tags <= set(backup.tags)]


class _Bucket:
    """One counted rule: keeps the newest backup of each of the last `left` spans that have one."""

    def __init__(self, name: str, left: int, key: Callable[[Dated], object]) -> None:
        self.name = name
        self.left = left
        self.key = key
        self.last: object = None

    def take(self, backup: Dated, is_oldest: bool) -> str:
        """Why the rule keeps this backup, or nothing.

        While spans are left the oldest backup stays too: so history reaches back as far as it can.
        """
        key = self.key(backup)
        if not self.left or (key == self.last and not is_oldest):
            return ""
        reason = self.name if key != self.last else f"oldest {self.name}"
        self.last = key
        if self.left != ALL:
            self.left -= 1
        return reason


def _buckets(policy: KeepPolicy, zone: tzinfo | None) -> list[_Bucket]:
    def local(backup: Dated) -> datetime:
        return parse_time(backup.time).astimezone(zone)

    keys: dict[str, Callable[[Dated], object]] = {
        "last": lambda backup: backup.id,
        "hourly": lambda backup: (local(backup).strftime("%Y-%m-%d %H"), local(backup).utcoffset()),
        "daily": lambda backup: local(backup).date(),
        "weekly": lambda backup: local(backup).isocalendar()[:2],
        "monthly": lambda backup: local(backup).strftime("%Y-%m"),
        "yearly": lambda backup: local(backup).year,
    }
    return [_Bucket(name, getattr(policy, name), key) for name, key in keys.items()]
