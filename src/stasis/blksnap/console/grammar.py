# SPDX-License-Identifier: Apache-2.0
"""The grammar of blksnap's command line, which is that of Boost.Program_options in its Unix style.

Scripts rely on its corners: long options may be abbreviated, a value is taken even if it looks like a long option,
switches may be written together, and words that belong to no option are passed over. argparse differs in each of
these. `tests/blksnap/console/boost.json` holds what Boost 1.74 itself answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stasis.errors import UsageError

__all__ = ["FLAG", "MANY", "ONE", "Option", "parse"]

FLAG, ONE, MANY = "flag", "one", "many"
"""An option without a value; with one value, given once; with any number of values, given any number of times."""


@dataclass(frozen=True)
class Option:
    """An option. Both names are without their dashes."""

    name: str
    short: str
    kind: str
    text: str

    def is_called(self, word: str) -> bool:
        """Whether this is its full name: `device`, or `-d` with the dash."""
        return word == self.name or word == f"-{self.short}"


@dataclass
class _Word:
    """What one word of the command line was understood as; without an option it is nobody's."""

    values: list[str]
    option: Option | None = None
    is_final: bool = False
    """It stands behind `--`, where no option may take it."""


@dataclass
class _Start:
    """An option as it was written: its name, the value joined to it, and the word it stands in."""

    name: str
    joined: str | None
    word: str


@dataclass
class _Parser:
    options: Sequence[Option]
    rest: list[str]
    words: list[_Word] = field(default_factory=list)

    def run(self) -> dict[str, list[str]]:
        while self.rest:
            self._step()
        for index, word in enumerate(self.words):
            if word.option is not None and word.option.kind == MANY:
                self._take_following(word, index + 1)
        return self._stored()

    def _step(self) -> None:
        starts = _starts(self.options, self.rest[0])
        if starts:
            del self.rest[0]
            for start in starts:
                self.words.append(self._finished(start, start is starts[-1]))
        elif self.rest[0] == "--":
            self.words += [_Word([text], is_final=True) for text in self.rest[1:]]
            self.rest.clear()
        else:
            self.words.append(_Word([self.rest.pop(0)]))

    def _finished(self, start: _Start, is_last: bool) -> _Word:
        """The option with the value that it must have."""
        word = _Word([] if start.joined is None else [start.joined])
        if not start.name:
            return word
        word.option = option = _find(self.options, start.name, start.word)
        if option.kind == FLAG:
            if word.values:
                raise UsageError(f"option '--{option.name}' does not take any arguments")
        elif not word.values:
            word.values.append(self._next_value(option, is_last))
        return word

    def _next_value(self, option: Option, is_last: bool) -> str:
        """The next word, unless it is the short name of an option; a long one is a value like any other."""
        if not is_last or not self.rest:
            raise _missing(option)
        if any(self.rest[0] == f"-{known.short}" for known in self.options):
            raise _missing(option)
        if _is_cut_off(self.rest[0]):
            raise _no_joined_value(f" '--{option.name}'")
        return self.rest.pop(0)

    def _take_following(self, word: _Word, index: int) -> None:
        for following in self.words[index:]:
            if following.option is not None or following.is_final:
                return
            word.values += following.values
            following.values = []

    def _stored(self) -> dict[str, list[str]]:
        stored: dict[str, list[str]] = {}
        for word in self.words:
            if word.option is None:
                continue
            if word.option.kind != MANY and word.option.name in stored:
                raise UsageError(f"option '--{word.option.name}' cannot be specified more than once")
            stored.setdefault(word.option.name, []).extend(word.values)
        return stored


def parse(options: Sequence[Option], arguments: Sequence[str]) -> dict[str, list[str]]:
    """Values by the name of their option; a flag that is given has none. Raises UsageError with Boost's sentence."""
    return _Parser(options, list(arguments)).run()


def _starts(options: Sequence[Option], word: str) -> list[_Start]:
    """The options that a word begins: one long one, or short ones written together; none for any other word."""
    if word.startswith("--") and len(word) > 2:
        return _long(word)
    if word.startswith("-") and len(word) > 1 and word[1] != "-":
        return _short(options, word)
    return []


def _long(word: str) -> list[_Start]:
    name, equals, joined = word[2:].partition("=")
    if _is_cut_off(word):
        raise _no_joined_value(f" '--{name}'" if name else "")
    return [_Start(name, joined if equals else None, word)]


def _is_cut_off(word: str) -> bool:
    """A long option that ends with its equal sign, which is refused even where it stands for a value."""
    return len(word) > 2 and word.startswith("--") and word.find("=") == len(word) - 1


def _no_joined_value(of: str) -> UsageError:
    return UsageError(f"the argument for option{of} should follow immediately after the equal sign")


def _short(options: Sequence[Option], word: str) -> list[_Start]:
    starts = []
    name, joined = word[:2], word[2:]
    while joined and any(option.kind == FLAG and option.is_called(name) for option in options):
        starts.append(_Start(name, None, word))
        name, joined = f"-{joined[0]}", joined[1:]
    return [*starts, _Start(name, joined or None, word)]


def _find(options: Sequence[Option], name: str, word: str) -> Option:
    """The option of this name, or the only one whose name begins so."""
    full = [option for option in options if option.is_called(name)]
    if full:
        return full[0]
    begun = [option for option in options if option.name.startswith(name)]
    if not begun:
        raise UsageError(f"unrecognised option '{word}'")
    if len(begun) > 1:
        *most, last = sorted(f"'--{option.name}'" for option in begun)
        raise UsageError(f"option '{word}' is ambiguous and matches {', '.join(most)}, and {last}")
    return begun[0]


def _missing(option: Option) -> UsageError:
    return UsageError(f"the required argument for option '--{option.name}' is missing")
