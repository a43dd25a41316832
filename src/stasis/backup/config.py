# SPDX-License-Identifier: Apache-2.0
"""The configuration of `stasis backup run`: repositories, and sets of devices, how to back them up and what to keep.

A mistake in it may show only when a backup is needed. So every key that is not known and every value of a wrong type
is an error that names it, and nothing is run then.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from stasis.backup.keep.policy import ALL, Duration, KeepPolicy
from stasis.errors import NotFoundError, PermissionDeniedError, StasisError, UsageError
from stasis.units import parse_seconds, parse_size

__all__ = ["DEFAULT_PATH", "BackupSet", "Configuration", "RepositoryEntry", "load"]

DEFAULT_PATH = Path("/etc/stasis/backup.toml")
T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
KINDS = ("auto", "full", "incremental", "differential")
LONGEST_FREEZE = 60.0
COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


@dataclass(frozen=True)
class RepositoryEntry:
    """A repository and what opens it: at most one of the three; without any the environment is asked."""

    name: str
    url: str
    key_file: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None


@dataclass(frozen=True)
class BackupSet:
    """Devices that are backed up together. Sizes are bytes, `rate` bytes per second, `wait` seconds.

    max_freeze, busy_freeze, on_busy, freeze_memory: how live devices may be treated; seconds and bytes; None: as usual.
    staging, staging_size: a directory for what does not fit into memory, and the most it takes.
    schedule: the name of the timer that runs it. self_check: share of the unchanged chunks that is compared, 0 to 1.
    keep: None forgets nothing. prune: delete afterwards what no backup needs.
    """

    name: str
    sources: tuple[str, ...]
    repository: RepositoryEntry
    kind: str = "auto"
    tags: tuple[str, ...] = ()
    schedule: str | None = None
    device: str | None = None
    host: str | None = None
    storage: str | None = None
    limit: int | None = None
    pre_snapshot: str | None = None
    post_snapshot: str | None = None
    self_check: float | None = None
    max_freeze: float | None = None
    busy_freeze: float | None = None
    on_busy: str = "freeze"
    freeze_memory: int | None = None
    staging: str | None = None
    staging_size: int | None = None
    skip_unreadable: bool = False
    rate: int | None = None
    wait: float = 0
    keep: KeepPolicy | None = None
    prune: bool = False

    @property
    def tag(self) -> str:
        """The tag of its backups, by which those to forget are found."""
        return f"set={self.name}"


@dataclass(frozen=True)
class Configuration:
    """All sets of a file, in its order."""

    path: Path
    sets: Mapping[str, BackupSet] = field(default_factory=dict)

    def choose(self, names: tuple[str, ...], schedule: str | None = None) -> list[BackupSet]:
        """The sets of these names, or of a schedule, or all. Raises NotFoundError, UsageError."""
        if schedule is not None:
            chosen = [one for one in self.sets.values() if one.schedule == schedule]
            if not chosen:
                raise NotFoundError(f"{self.path}: no set has the schedule {schedule}",
                                    hint=f'give a set the line: schedule = "{schedule}"')
            return chosen
        if not self.sets:
            raise UsageError(f"{self.path} describes no set", hint="add a table [set.NAME] with sources and repository")
        for name in names:
            if name not in self.sets:
                raise NotFoundError(f"{self.path}: there is no set {name}", hint=_hint(name, self.sets))
        return [self.sets[name] for name in dict.fromkeys(names)] or list(self.sets.values())


def load(path: Path) -> Configuration:
    """Read a file. Raises NotFoundError, PermissionDeniedError, and UsageError that names what is wrong."""
    try:
        with path.open("rb") as file:
            _refuse_foreign(path, os.fstat(file.fileno()))
            values = tomllib.load(file)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no configuration {path}",
                            hint="docs/guide/backup-config.md shows one; --config names another") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{path}: {error.strerror}", hint="run as root, or name another with --config"
                                    ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}", hint="see https://toml.io for the syntax") from error
    return _configuration(path, values)


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    """The file names commands, so whoever may write it may do all that this user may."""
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
        raise PermissionDeniedError(f"{path} can be written by others, and names commands to run",
                                    hint=f"chown it to root and chmod o-w {path}")


def _configuration(path: Path, values: dict[str, Any]) -> Configuration:
    top = _Table(str(path), values)
    found = top.tables("repository")
    sets = top.tables("set")
    top.end()
    repositories = {name: _repository(name, table) for name, table in found.items()}
    return Configuration(path, {name: _set(name, table, repositories) for name, table in sets.items()})


def _repository(name: str, table: _Table) -> RepositoryEntry:
    entry = RepositoryEntry(name, table.text("url", required=True), table.text("key-file"),
                            table.text("passphrase-file"), table.text("passphrase-command"))
    table.end({"passphrase": "keep it in a file of mode 0600 and name that: passphrase-file"})
    if sum(one is not None for one in (entry.key_file, entry.passphrase_file, entry.passphrase_command)) > 1:
        table.wrong("has more than one of key-file, passphrase-file and passphrase-command", "keep one of them")
    return entry


def _tags(table: _Table) -> tuple[str, ...]:
    tags = table.texts("tags")
    for tag in tags:
        if not tag.strip() or "," in tag or not tag.isprintable():
            table.wrong(f"has {tag!r} for a tag", "a tag has no comma, and only characters that can be seen")
    return tags


def _set(name: str, table: _Table, repositories: Mapping[str, RepositoryEntry]) -> BackupSet:
    wanted = table.text("repository", required=True)
    if wanted not in repositories:
        table.wrong(f"names the repository {wanted!r}, which the file does not describe", _hint(wanted, repositories))
    sources = table.texts("sources")
    if not sources:
        table.wrong("has no sources", 'give it some: sources = ["data"]')
    keep = table.table("keep")
    made = BackupSet(
        name=name, sources=sources, repository=repositories[wanted], kind=table.choice("kind", KINDS),
        tags=_tags(table), schedule=table.text("schedule"), device=table.text("name"), host=table.text("host"),
        storage=table.text("storage"), limit=table.size("limit"), pre_snapshot=table.text("pre-snapshot"),
        post_snapshot=table.text("post-snapshot"), max_freeze=table.converted("max-freeze", parse_seconds),
        busy_freeze=table.converted("busy-freeze", parse_seconds),
        on_busy=table.choice("on-busy", ("freeze", "throttle", "fail")), freeze_memory=table.size("freeze-memory"),
        staging=table.text("staging"), staging_size=table.size("staging-size"),
        self_check=table.share("self-check"),
        skip_unreadable=table.choice("on-read-error", ("fail", "skip")) == "skip", rate=table.size("limit-rate"),
        wait=table.number("wait"), keep=_keep(keep) if keep else None, prune=table.flag("prune"))
    table.end({"source": "the key is sources, a list", "hooks": "the keys are pre-snapshot and post-snapshot",
               "retention": "the table is keep"})
    if made.device is not None and len(sources) > 1:
        table.wrong("has a name for its only source, and several sources", "leave the name out")
    for key, seconds in (("max-freeze", made.max_freeze), ("busy-freeze", made.busy_freeze)):
        if seconds is not None and not 0 < seconds <= LONGEST_FREEZE:
            table.wrong(f"has a {key} of {seconds:g} s", "a freeze takes more than nothing, and at most a minute")
    if made.staging is None and made.staging_size is not None:
        table.wrong("has a staging-size without staging", "say where: staging = DIRECTORY")
    if made.rate == 0:
        table.wrong("has limit-rate 0, which would never end", "leave it out to read as fast as possible")
    return made


def _keep(table: _Table) -> KeepPolicy:
    counts = {name: table.count(name) for name in COUNTS}
    within = table.converted("within", Duration.parse)
    tags = tuple(frozenset(text.split(",")) for text in table.texts("tags"))
    table.end({"tag": "the key is tags, a list"})
    policy = KeepPolicy(**counts, within=within, tags=tags)
    if policy.is_empty:
        table.wrong("keeps nothing", "say how many to keep, as in daily = 14, or leave the table out to keep all")
    return policy


class _Table:
    """A table of the file. Each key is asked for once; `end` refuses those that nobody asked for."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self._where = where
        self._left = dict(values)
        self._known: list[str] = []

    def wrong(self, what: str, hint: str) -> NoReturn:
        """Refuse the table."""
        raise UsageError(f"{self._where} {what}", hint=hint)

    def end(self, hints: Mapping[str, str] | None = None) -> None:
        """Raise UsageError for a key that is not known."""
        for key in self._left:
            self.wrong(f"has a key that is not known: {key}", (hints or {}).get(key) or _hint(key, self._known))

    def text(self, key: str, *, required: bool = False) -> Any:
        """A string that is not empty; None where it may be missing and is."""
        value = self._take(key, str, "a text in quotes")
        if value is None and required:
            self.wrong(f"has no {key}", f'add a line: {key} = "..."')
        if value == "":
            self.wrong(f"has an empty {key}", "give it a value, or leave it out")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._take(key, list, "a list of texts") or []
        if not all(isinstance(text, str) and text for text in value):
            self._type(key, "a list of texts")
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of these words, the first by default."""
        value: str = self._take(key, str, "a text in quotes") or allowed[0]
        if value not in allowed:
            self.wrong(f"has {key} = {value!r}", f"it can be {', '.join(allowed)}")
        return value

    def flag(self, key: str) -> bool:
        """true or false."""
        return bool(self._take(key, bool, "true or false"))

    def number(self, key: str) -> float:
        """A number of seconds."""
        value = self._take(key, (int, float), "a number of seconds") or 0
        if not 0 <= value < 1 << 31:
            self._type(key, "a number of seconds")
        return float(value)

    def count(self, key: str) -> int:
        """A number of backups, or "all"."""
        value = self._take(key, (int, str), 'a number, or "all"') or 0
        if value == "all":
            return ALL
        if not isinstance(value, int) or value < 0:
            self._type(key, 'a number, or "all"')
        return value

    def size(self, key: str) -> int | None:
        """A size as "50G", or a number of bytes."""
        return self.converted(key, parse_size)

    def share(self, key: str) -> float | None:
        """A percentage, as a number from 0 to 1."""
        return self.converted(key, _share)

    def converted(self, key: str, convert: Callable[[str], T]) -> T | None:
        """What a conversion makes of a text or number."""
        value = self._take(key, (int, float, str), "a text or number")
        if value is None:
            return None
        try:
            return convert(str(value))
        except StasisError as error:
            raise UsageError(f"{self._where}: {key}: {error.message}", hint=error.hint) from error

    def table(self, key: str) -> _Table | None:
        """A table in this one."""
        value = self._take(key, dict, "a table")
        return None if value is None else _Table(f"{self._where}: {key}", value)

    def tables(self, key: str) -> dict[str, _Table]:
        """Tables by their names."""
        found = {}
        for name, value in (self._take(key, dict, f"tables, as in [{key}.NAME]") or {}).items():
            if not isinstance(value, dict):
                self._type(key, f"tables, as in [{key}.NAME]")
            if not NAME.fullmatch(name):
                self.wrong(f"has the {key} {name!r}", "names are letters, digits, and - _ . inside")
            found[name] = _Table(f"{self._where}: {key} {name}", value)
        return found

    def _take(self, key: str, kinds: type | tuple[type, ...], said: str) -> Any:
        self._known.append(key)
        value = self._left.pop(key, None)
        if value is None:
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            self._type(key, said)
        return value

    def _type(self, key: str, said: str) -> NoReturn:
        self.wrong(f"has a wrong value for {key}", f"it must be {said}")


def _share(text: str) -> float:
    number = text.removesuffix("%").strip()
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", number, re.ASCII) or float(number) > 100:
        raise UsageError(f"{text!r} is no percentage", hint="write a number from 0 to 100, as in 0.1")
    return float(number) / 100


def _hint(name: str, known: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(known)}" if known else "the file describes none"
