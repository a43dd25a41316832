# SPDX-License-Identifier: Apache-2.0
"""What waits in a pseudo terminal to be read, in both directions: taken out, and put back as if it had never left.

Nothing can look into a terminal without reading, so what was read is written again. The line discipline must do nothing
with it a second time (drivers/tty/n_tty.c): its settings are others meanwhile, and each character that would mean
something in a line is quoted. Packet mode is off meanwhile, as the master would be told of the settings. Whoever reads
the terminal stands still; `held_outside` tells of those who do not. docs/design/process.md has the whole of it.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from stasis.errors import StateError
from stasis.linux.ioctl import IO, IOR, IOW
from stasis.process.helpers import apart

__all__ = ["ROOM", "TCGETS2", "TCSETS2", "Pair", "Settings", "Unread", "get", "held_outside", "looked_at"]

# include/uapi/asm-generic/ioctls.h
TIOCPKT = 0x5420
TCGETS2, TCSETS2 = IOR("T", 0x2A, 44), IOW("T", 0x2B, 44)
TIOCSPTLCK, TIOCGPTLCK, TIOCGPKT = IOW("T", 0x31, 4), IOR("T", 0x39, 4), IOR("T", 0x38, 4)
TIOCGPTPEER = IO("T", 0x41)
LAYOUT = struct.Struct("<4IB19sII")  # struct termios2
INT, LENGTHS = struct.Struct("<i"), struct.Struct("<II")
ROOM = 4095
"""Bytes that a reader's buffer holds (N_TTY_BUF_SIZE - 1); more waits in front of it, and was not looked at."""
CHUNK, SMALLEST_BUFFER, LARGEST_BUFFER = 1 << 16, 256, 3584
STOP, END_OF_FILE, QUOTE = 0x13, 0x04, 0x16
PATIENCE = 5.0
"""Seconds for a worker of the kernel to hand on what was written."""
EDITING = (termios.VERASE, termios.VKILL, termios.VEOF, termios.VEOL)
MORE_EDITING = (termios.VEOL2, termios.VWERASE, termios.VREPRINT, termios.VLNEXT)
"""Those that mean something with IEXTEN only."""
FLOW = (termios.VINTR, termios.VQUIT, termios.VSUSP, termios.VSTART, termios.VSTOP)


class Unread(NamedTuple):
    """`output` is for who reads the master, `input` for who reads the slave: in canonical mode as it would be typed."""

    output: bytes
    input: bytes


class Settings(NamedTuple):
    """A struct termios2."""

    iflag: int
    oflag: int
    cflag: int
    lflag: int
    line: int
    cc: bytes
    ispeed: int
    ospeed: int

    @classmethod
    def of(cls, fd: int) -> Self:
        """Those of a terminal, which its master tells as well."""
        return cls(*LAYOUT.unpack(fcntl.ioctl(fd, TCGETS2, bytes(LAYOUT.size))))

    def set(self, fd: int) -> None:
        """Give them to a terminal, at once."""
        fcntl.ioctl(fd, TCSETS2, LAYOUT.pack(*self))

    @property
    def canonical(self) -> bool:
        """Whether it is read by lines."""
        return bool(self.lflag & termios.ICANON)

    def with_characters(self, changes: dict[int, int]) -> Settings:
        """The same with other special characters."""
        cc = bytearray(self.cc)
        for at, value in changes.items():
            cc[at] = value
        return self._replace(cc=bytes(cc))

    def quiet(self) -> Settings:
        """For what was worked on already: nothing is changed, echoed or told to anybody. Lines end as they do, and can
        be ended and quoted; a character stops the output, which is how the end of what was written shows."""
        extended = self.lflag & termios.IEXTEN
        unused = {} if extended else dict.fromkeys(MORE_EDITING, 0)
        named = {termios.VEOF: self.cc[termios.VEOF] or END_OF_FILE, termios.VSTART: 0, termios.VSTOP: STOP,
                 termios.VLNEXT: (extended and self.cc[termios.VLNEXT]) or QUOTE}  # fmt: skip
        kept = self.lflag & termios.ICANON
        return self._replace(iflag=0, oflag=0, lflag=kept | termios.IEXTEN).with_characters(unused | named)


def get(fd: int, request: int) -> int:
    """The number that a request tells."""
    return int(INT.unpack(fcntl.ioctl(fd, request, bytes(INT.size)))[0])


class Pair:
    """A pseudo terminal while what waits in it is moved; a context manager that has it as it was in the end."""

    def __init__(self, master: int) -> None:
        self.taken = Unread(b"", b"")
        self._master = master
        self._locked, self._packets = get(master, TIOCGPTLCK), get(master, TIOCGPKT)

    def __enter__(self) -> Self:
        fcntl.ioctl(self._master, TIOCSPTLCK, INT.pack(0))
        fcntl.ioctl(self._master, TIOCPKT, INT.pack(0))
        self._slave = fcntl.ioctl(self._master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._settings = Settings.of(self._slave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settings.set(self._slave)
        os.close(self._slave)
        fcntl.ioctl(self._master, TIOCPKT, INT.pack(self._packets))
        fcntl.ioctl(self._master, TIOCSPTLCK, INT.pack(self._locked))

    def look(self) -> Unread:
        """What waits, which waits on afterwards, and whether the output is stopped, which it then is again."""
        try:
            for chunk in self._written():
                self.taken = self.taken._replace(output=self.taken.output + chunk)
            for chunk in self._typed():
                self.taken = self.taken._replace(input=self.taken.input + chunk)
        finally:
            how = self._start()
            self.put(self.taken)
            self._stop(how)
        return self.taken

    def put(self, unread: Unread) -> None:
        """Have these wait in the terminal, where nothing waits."""
        quiet = self._settings.quiet()
        if unread.input:
            if quiet.canonical:
                quiet._replace(iflag=termios.IXON).set(self._slave)
                self._write(self._master, unread.input + bytes([STOP]))
                self._wait(lambda: not self._can_write())
                quiet.set(self._slave)  # without IXON: the output goes on
            else:
                quiet.set(self._slave)
                self._write(self._master, unread.input)
                self._wait(lambda: get(self._slave, termios.FIONREAD) >= min(len(unread.input), ROOM))
        if unread.output:
            quiet.set(self._slave)
            self._write(self._slave, unread.output)

    def _written(self) -> Iterator[bytes]:
        while select.select([self._master], [], [], 0)[0]:  # it may block, but nobody else reads
            yield os.read(self._master, CHUNK)

    def _typed(self) -> Iterator[bytes]:
        if not self._settings.canonical:
            yield from self._reads()
            return
        ends = self._line_ends()
        for line in self._reads():
            end = line[-1:] if line[-1:] in ends else b""
            yield self._quoted(line[: len(line) - len(end)]) + (end or bytes([self._settings.quiet().cc[termios.VEOF]]))
        self._settings._replace(lflag=self._settings.lflag & ~(termios.ICANON | termios.ECHO)).set(self._slave)
        for rest in self._reads():  # of a line that has not ended
            yield self._quoted(rest)

    def _reads(self) -> Iterator[bytes]:
        for _ in range(CHUNK):
            try:
                yield os.read(self._slave, CHUNK)
            except BlockingIOError:
                return

    def _line_ends(self) -> set[bytes]:
        quiet = self._settings.quiet()
        named = (quiet.cc[at] for at in (termios.VEOL, termios.VEOL2))
        return {b"\n", *(bytes([value]) for value in named if value)}

    def _quoted(self, line: bytes) -> bytes:
        """All that would mean something, now or when the output is stopped and signals are sent, is taken as it is."""
        quiet = self._settings.quiet()
        special = {quiet.cc[at] for at in (*EDITING, *MORE_EDITING)} | {self._settings.cc[at] for at in FLOW}
        special = (special | {ord("\n"), STOP}) - {0}
        quote = quiet.cc[termios.VLNEXT]
        return b"".join(bytes([quote, value] if value in special else [value]) for value in line)

    def _can_write(self) -> bool:
        return bool(select.select([], [self._slave], [], 0)[1])

    def _start(self) -> str:
        """Have the output go on, if it was stopped; how it was."""
        if self._can_write():
            return ""
        termios.tcflow(self._slave, termios.TCOON)
        if self._can_write():
            return "call"
        self._settings._replace(iflag=self._settings.iflag & ~termios.IXON).set(self._slave)
        return "character"

    def _stop(self, how: str) -> None:
        if how == "call":
            termios.tcflow(self._slave, termios.TCOOFF)
        elif how == "character":
            self._settings.quiet()._replace(iflag=termios.IXON).set(self._slave)
            self._write(self._master, bytes([STOP]))
            self._wait(lambda: not self._can_write())

    def _write(self, fd: int, data: bytes) -> None:
        """The kernel has a limit for what its buffers occupy, looked at before each (drivers/tty/tty_buffer.c): small
        ones use it up, and a large one is the last. So what fitted before fits again, however it had been written."""
        deadline = time.monotonic() + PATIENCE
        while data:
            if fd == self._master and not select.select([], [fd], [], 0)[1]:
                self._be_patient(deadline)  # its description may block
                continue
            is_last = fd == self._slave and len(data) <= LARGEST_BUFFER
            try:
                data = data[os.write(fd, data if is_last else data[:SMALLEST_BUFFER]) :]
            except BlockingIOError:
                self._be_patient(deadline)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self._be_patient(deadline)

    def _be_patient(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise StateError(f"the terminal {os.ttyname(self._slave)} does not take back what waited in it")
        time.sleep(0.0001)


def looked_at(masters: Sequence[int]) -> list[Unread]:
    """What waits in these terminals, by their masters. At no moment is it only in the memory of a process that may be
    killed with the dumper. StateError where it cannot be put back."""
    told = apart("what waits in a terminal cannot be kept", lambda: b"".join(map(_look, masters)))
    return list(_parsed(told))


def _look(master: int) -> bytes:
    with Pair(master) as pair:
        found = pair.look()
    return LENGTHS.pack(*map(len, found)) + b"".join(found)


def _parsed(told: bytes) -> Iterator[Unread]:
    at = 0
    while at < len(told):
        output, typed = LENGTHS.unpack_from(told, at)
        at += LENGTHS.size
        yield Unread(told[at : at + output], told[at + output : at + output + typed])
        at += output + typed


def held_outside(tree: Iterable[int]) -> set[int]:
    """The numbers of the pseudo terminals that processes outside of a tree have open, as far as we may see them."""
    known = set(map(str, tree))
    found: set[int] = set()
    for pid in os.listdir("/proc"):
        if pid.isdigit() and pid not in known:
            try:
                found.update(_terminals_of(pid))
            except (PermissionError, FileNotFoundError, ProcessLookupError):
                continue  # another user's, or gone
    return found


def _terminals_of(pid: str) -> Iterator[int]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        link = os.readlink(f"/proc/{pid}/fd/{fd}")
        if "/pts/" in link and link.rpartition("/")[2].isdigit():
            yield int(link.rpartition("/")[2])
        elif link.endswith("ptmx"):
            with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                yield from (int(line.split()[1]) for line in file if line.startswith("tty-index"))
