# SPDX-License-Identifier: Apache-2.0
"""The configuration of backups: what is written is what is run, and a mistake is told before anything is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from stasis.backup.config import BackupSet, Configuration, load
from stasis.backup.keep.policy import ALL, Duration, KeepPolicy
from stasis.errors import NotFoundError, PermissionDeniedError, UsageError

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "backup-config.md"

FULL = """
[repository.offsite]
url = "s3://bucket/backups"
passphrase-file = "/etc/stasis/passphrase"

[repository.near]
url = "/srv/backups"
key-file = "/etc/stasis/key"

[set.databases]
sources = ["data", "logs"]
repository = "offsite"
kind = "incremental"
tags = ["db", "prod"]
schedule = "hourly"
host = "db1"
storage = "memory"
limit = "2G"
pre-snapshot = "pg_ctl freeze"
post-snapshot = "pg_ctl thaw"
self-check = "0.5%"
on-read-error = "skip"
max-freeze = "150ms"
on-busy = "fail"
freeze-memory = "1G"
limit-rate = "100M"
wait = 60
prune = true

[set.databases.keep]
last = 3
hourly = 24
daily = 14
weekly = 8
monthly = 12
yearly = "all"
within = "2d"
tags = ["keep", "year,end"]

[set.home]
sources = ["/dev/vdb"]
repository = "near"
name = "home"
"""
SMALL = '[repository.r]\nurl = "/r"\n[set.s]\nsources = ["d"]\nrepository = "r"\n'


def loaded(tmp_path: Path, text: str) -> Configuration:
    (tmp_path / "backup.toml").write_text(text)
    return load(tmp_path / "backup.toml")


def test_everything_that_can_be_said_is_understood(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, FULL)
    one, two = configuration.sets.values()
    assert (one.repository.url, one.repository.passphrase_file) == ("s3://bucket/backups", "/etc/stasis/passphrase")
    assert one == BackupSet(
        name="databases", sources=("data", "logs"), repository=one.repository, kind="incremental",
        tags=("db", "prod"), schedule="hourly", host="db1", storage="memory", limit=2 << 30,
        pre_snapshot="pg_ctl freeze", post_snapshot="pg_ctl thaw", self_check=0.005, skip_unreadable=True,
        rate=100 << 20, wait=60, max_freeze=0.15, on_busy="fail", freeze_memory=1 << 30, prune=True,
        keep=KeepPolicy(last=3, hourly=24, daily=14, weekly=8, monthly=12, yearly=ALL, within=Duration(hours=48),
                        tags=(frozenset({"keep"}), frozenset({"year", "end"}))))
    assert two == BackupSet(name="home", sources=("/dev/vdb",), repository=two.repository, device="home")
    assert (two.keep, two.prune, two.repository.key_file) == (None, False, "/etc/stasis/key")


def test_sets_are_chosen_by_name_by_schedule_or_all(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, FULL)
    assert [one.name for one in configuration.choose(())] == ["databases", "home"]
    assert [one.name for one in configuration.choose(("home", "home"))] == ["home"]
    assert [one.name for one in configuration.choose((), "hourly")] == ["databases"]
    with pytest.raises(NotFoundError, match="there is no set hom") as caught:
        configuration.choose(("hom",))
    assert caught.value.hint == "did you mean home?"
    with pytest.raises(NotFoundError, match="no set has the schedule weekly"):
        configuration.choose((), "weekly")


WRONG = {
    "[sets.x]": ("has a key that is not known: sets", "did you mean set?"),
    SMALL + 'source = ["x"]': ("set s has a key that is not known: source", "the key is sources, a list"),
    SMALL + "self_check = 1": ("set s has a key that is not known: self_check", "did you mean self-check?"),
    SMALL + "[set.s.keep]\ndayly = 3": ("set s: keep has a key that is not known: dayly", "did you mean daily?"),
    SMALL + "[set.s.keep]\ndaily = 0": ("set s: keep keeps nothing", "how many to keep"),
    SMALL + "[set.s.keep]\ndaily = -1": ("has a wrong value for daily", 'a number, or "all"'),
    SMALL + "[set.s.keep]\ndaily = true": ("has a wrong value for daily", 'a number, or "all"'),
    SMALL + '[set.s.keep]\nwithin = "soon"': ("within: 'soon' is no duration", "Write years"),
    SMALL + 'kind = "whole"': ("has kind = 'whole'", "auto, full, incremental, differential"),
    SMALL + 'limit = "much"': ("limit: 'much' is not a size", "Write a number"),
    SMALL + 'self-check = "some"': ("self-check: 'some' is no percentage", "from 0 to 100"),
    SMALL + "self-check = 101": ("self-check: '101' is no percentage", "from 0 to 100"),
    SMALL + 'max-freeze = "2m"': ("has a max-freeze of 120 s", "at most a minute"),
    SMALL + 'on-busy = "wait"': ("has on-busy = 'wait'", "freeze, throttle, fail"),
    SMALL + 'limit-rate = "0"': ("has limit-rate 0", "leave it out"),
    SMALL + "wait = -1": ("has a wrong value for wait", "a number of seconds"),
    SMALL + 'prune = "yes"': ("has a wrong value for prune", "true or false"),
    SMALL + 'tags = ["a,b"]': ("has 'a,b' for a tag", "no comma"),
    SMALL + 'tags = [" "]': ("has ' ' for a tag", "can be seen"),
    SMALL + 'tags = ["a\\u0007"]': ("for a tag", "can be seen"),
    SMALL + "tags = [1]": ("has a wrong value for tags", "a list of texts"),
    SMALL + 'host = ""': ("has an empty host", "leave it out"),
    SMALL.replace('["d"]', '["d", "e"]') + 'name = "n"': ("several sources", "leave the name out"),
    SMALL.replace('["d"]', '"d"'): ("has a wrong value for sources", "a list of texts"),
    SMALL.replace('["d"]', "[]"): ("set s has no sources", "sources ="),
    SMALL.replace('repository = "r"', ""): ("set s has no repository", "repository ="),
    SMALL.replace('repository = "r"', 'repository = "q"'): ("names the repository 'q'", "known are r"),
    SMALL.replace("[set.s]", "[set.'a b']"): ("has the set 'a b'", "letters, digits"),
    '[repository.r]\nurl = "/r"\npassphrase = "x"': ("not known: passphrase", "passphrase-file"),
    '[repository.r]\nurl = "/r"\nkey-file = "x"\npassphrase-file = "y"': ("more than one of", "keep one"),
    "repository = 3": ("has a wrong value for repository", "[repository.NAME]"),
    "[set.s\n": ("is no TOML", "toml.io"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    said, hint = WRONG[text]
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, text)
    assert said in caught.value.message
    assert str(tmp_path / "backup.toml") in caught.value.message
    assert hint in caught.value.hint


def test_a_file_that_is_missing_or_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no configuration"):
        load(tmp_path / "backup.toml")
    (tmp_path / "backup.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is no TOML"):
        load(tmp_path / "backup.toml")


def test_a_file_that_others_may_write_is_not_obeyed(tmp_path: Path) -> None:
    loaded(tmp_path, SMALL)
    (tmp_path / "backup.toml").chmod(0o666)
    with pytest.raises(PermissionDeniedError, match="can be written by others"):
        load(tmp_path / "backup.toml")


@pytest.mark.root
def test_a_file_of_another_user_is_not_obeyed_by_root(tmp_path: Path) -> None:
    loaded(tmp_path, SMALL)
    os.chown(tmp_path / "backup.toml", 12345, -1)
    with pytest.raises(PermissionDeniedError, match="can be written by others"):
        load(tmp_path / "backup.toml")


def test_a_file_without_sets_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="describes no set"):
        loaded(tmp_path, '[repository.r]\nurl = "/r"\n').choose(())


def test_every_example_of_the_guide_is_understood_and_every_key_explained(tmp_path: Path) -> None:
    page = PAGE.read_text()
    examples = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        assert loaded(tmp_path, example).sets
    keys = set(re.findall(r"^([a-z-]+) = ", FULL, re.MULTILINE))
    cells = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    explained = {key for cell in cells for key in re.findall(r"`(.+?)`", cell)}
    assert keys | {"keep", "passphrase-command"} <= explained
