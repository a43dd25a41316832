# SPDX-License-Identifier: Apache-2.0
"""`forget` keeps what its rules say, and never the wrong ones: checked against restic's rules written down naively."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.backup.keep.policy import ALL, Duration, KeepPolicy, decide, group_backups
from stasis.errors import UsageError

NOW = datetime(2026, 6, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Backup:
    id: str
    time: str
    host: str = "h"
    device: str = "vda"
    set_id: str = "s"
    tags: tuple[str, ...] = ()


def backup(moment: datetime, **fields: object) -> Backup:
    return Backup(moment.strftime("%Y%m%d%H%M%S"), moment.isoformat(), **fields)  # type: ignore[arg-type]


def kept(backups: list[Backup], policy: KeepPolicy, zone: tzinfo = UTC) -> list[str]:
    return [each.backup.id for each in decide(backups, policy, frozenset(), NOW, zone) if each.keep]


def days(*numbers: int) -> list[Backup]:
    return [backup(datetime(2026, 5, 1, 12, tzinfo=UTC) + timedelta(days=number)) for number in numbers]


def test_the_last_ones_are_the_newest() -> None:
    backups = days(3, 1, 2, 0)
    assert kept(backups, KeepPolicy(last=2)) == ["20260504120000", "20260503120000"]


def test_daily_keeps_the_newest_of_each_day_that_has_one() -> None:
    backups = [*days(0, 1, 9), *[backup(datetime(2026, 5, 2, hour, tzinfo=UTC)) for hour in (1, 23)]]
    assert kept(backups, KeepPolicy(daily=2)) == ["20260510120000", "20260502230000"]


def test_a_rule_with_spans_left_keeps_the_oldest_too() -> None:
    backups = [backup(datetime(2026, 5, 2, hour, tzinfo=UTC)) for hour in (1, 2, 3)]
    assert kept(backups, KeepPolicy(yearly=2)) == ["20260502030000", "20260502010000"]
    assert kept(backups, KeepPolicy(yearly=1)) == ["20260502030000"]


def test_weeks_are_those_of_the_calendar_over_new_year() -> None:
    new_year = [backup(datetime(2025, 12, 29, tzinfo=UTC)), backup(datetime(2026, 1, 4, tzinfo=UTC)),
                backup(datetime(2026, 1, 5, tzinfo=UTC))]
    assert kept(new_year, KeepPolicy(weekly=2)) == ["20260105000000", "20260104000000"]


def test_days_begin_at_midnight_of_the_given_zone() -> None:
    evening = [backup(datetime(2026, 5, 1, 21, 30, tzinfo=UTC)), backup(datetime(2026, 5, 1, 22, 30, tzinfo=UTC))]
    assert len(kept(evening, KeepPolicy(daily=1))) == 1
    assert len(kept(evening, KeepPolicy(daily=2), ZoneInfo("Europe/Berlin"))) == 2
    assert len(kept([*evening, backup(datetime(2026, 5, 1, 23, tzinfo=UTC))], KeepPolicy(daily=2),
                    ZoneInfo("Europe/Berlin"))) == 2


def test_the_hour_that_a_clock_change_repeats_is_two_hours() -> None:
    zone = ZoneInfo("Europe/Berlin")
    backups = [backup(datetime(2025, 10, 26, hour, 30, tzinfo=UTC)) for hour in (0, 1, 2)]  # 02:30, 02:30, 03:30
    assert len(kept(backups, KeepPolicy(hourly=3), zone)) == 3


def test_within_counts_from_the_newest_backup() -> None:
    assert kept(days(0, 5, 9, 10), KeepPolicy(within=Duration.parse("2d"))) == ["20260511120000", "20260510120000"]


def test_a_backup_from_the_future_stays_and_moves_nothing() -> None:
    future = backup(NOW + timedelta(days=400))
    backups = [*days(0, 9), future]
    assert kept(backups, KeepPolicy(within=Duration.parse("2d"))) == [future.id, "20260510120000"]


def test_tags_in_one_list_must_all_be_there() -> None:
    backups = [backup(datetime(2026, 5, day, tzinfo=UTC), tags=tags)
               for day, tags in enumerate([("a",), ("a", "b"), ("c",), ()], 1)]
    policy = KeepPolicy(tags=(frozenset({"a", "b"}), frozenset({"c"})))
    assert kept(backups, policy) == ["20260503000000", "20260502000000"]


def test_all_instead_of_a_number_keeps_every_span() -> None:
    assert len(kept(days(0, 1, 2, 3), KeepPolicy(daily=ALL))) == 4


def test_the_newest_of_a_device_stays_though_no_rule_wants_it() -> None:
    backups = days(0, 1)
    decisions = decide(backups, KeepPolicy(tags=(frozenset({"x"}),)), frozenset({backups[1].id}), NOW, UTC)
    assert [(d.backup.id, d.reasons) for d in decisions] == [(backups[1].id, ("newest of its device",)),
                                                             (backups[0].id, ())]


def test_groups() -> None:
    backups = [backup(NOW, host="a"), backup(NOW, host="b"), backup(NOW, host="a", device="vdb", tags=("y", "x"))]
    assert list(group_backups(backups, ["host"])) == [("a",), ("b",)]
    assert list(group_backups(backups, ["host", "device"])) == [("a", "vda"), ("b", "vda"), ("a", "vdb")]
    assert list(group_backups(backups, ["tags"])) == [("",), ("x,y",)]
    assert list(group_backups(backups, ["set"])) == [("s",)]
    assert list(group_backups(backups, [])) == [()]
    with pytest.raises(UsageError):
        group_backups(backups, ["colour"])


@pytest.mark.parametrize(("text", "moment"), [
    ("1m", "2026-02-28T12:00:00+00:00"), ("1y", "2025-03-31T12:00:00+00:00"), ("2w", "2026-03-17T12:00:00+00:00"),
    ("1d12h", "2026-03-30T00:00:00+00:00"), ("1y1m", "2025-02-28T12:00:00+00:00"),
    ("999999d", "0001-01-01T00:00:00+00:00"),
    ("99999y", "0001-01-01T00:00:00+00:00"),
])
def test_durations_follow_the_calendar(text: str, moment: str) -> None:
    assert Duration.parse(text).before(datetime(2026, 3, 31, 12, tzinfo=UTC)).isoformat() == moment


@pytest.mark.parametrize("text", ["", " ", "7", "d7", "7d1m", "-1d", "1.5d", "7days"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no duration"):
        Duration.parse(text)


# The rules once more, each as a set, without counting down.

def _newest_of_spans(ordered: list[Backup], count: int, form: str) -> set[str]:
    spans: dict[str, str] = {}
    for each in ordered:  # newest first
        spans.setdefault(datetime.fromisoformat(each.time).strftime(form), each.id)
    wanted = set(list(spans.values())[:count])
    return wanted | {ordered[-1].id} if ordered and len(spans) < count else wanted


MOMENTS = st.integers(0, 3 * 365 * 24).map(lambda hours: NOW - timedelta(hours=hours))
COUNTS = st.integers(0, 5)
FORMS = {"last": "%Y-%m-%d %H:%M:%S", "hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-%V",
         "monthly": "%Y-%m", "yearly": "%Y"}


@given(moments=st.lists(MOMENTS, unique=True, max_size=40), counts=st.fixed_dictionaries(dict.fromkeys(FORMS, COUNTS)))
def test_the_counted_rules_are_the_union_of_each_alone(moments: list[datetime], counts: dict[str, int]) -> None:
    backups = [backup(moment) for moment in moments]
    ordered = sorted(backups, key=lambda each: each.time, reverse=True)
    expected = set().union(*(_newest_of_spans(ordered, count, FORMS[rule]) for rule, count in counts.items()))
    assert set(kept(backups, KeepPolicy(**counts))) == expected
