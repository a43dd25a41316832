# SPDX-License-Identifier: Apache-2.0
"""The programs and maps in the kernel, kept by pins in a bpf file system, so that tracking needs no process.

All tracked devices of a state directory share one set below /sys/fs/bpf. Loading and unloading happen under a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from stasis.errors import PermissionDeniedError, StasisError, UnsupportedError
from stasis.linux import bpf, btf, libc, mounts
from stasis.live import kerneltypes, layout, programs
from stasis.live.functions import FUNCTIONS, Maps
from stasis.live.layout import SLOTS, Lost, Slot, slot_offset

__all__ = ["Hooks", "directory_of", "explain", "locked", "remove", "try_loading"]

BPFFS = "/sys/fs/bpf"
OUR_MOUNT = "stasis"
"""Source of the mount where the system had none, so that the last one to leave can take it away."""
LOCK = "/run/stasis-live.lock"
DEFAULT_STATE = Path("/var/lib/stasis")

INDEX = struct.Struct("<I")
EPOCH = struct.Struct("@Q")  # native: stored at once, not byte by byte

_mount = libc.libc.mount


def directory_of(state: Path) -> Path:
    """Where the pins of a state directory are."""
    # A name with a dot is not allowed (kernel/bpf/inode.c, bpf_lookup).
    own = "" if state == DEFAULT_STATE else f"-{zlib.crc32(os.fsencode(state)):08x}"
    return Path(BPFFS) / f"stasis{own}"


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Nobody else loads, unloads, adds or removes. PermissionDeniedError for others than root."""
    try:
        fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise PermissionDeniedError("tracking changes of live devices needs root", hint="use sudo") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _is_mounted() -> bool:
    return any(mount.target == BPFFS and mount.fstype == "bpf" for mount in mounts.mounts())


def ensure_mounted() -> None:
    """Mount the bpf file system where the system has not (systemd always does). UnsupportedError."""
    if _is_mounted():
        return
    try:
        libc.check(_mount(OUR_MOUNT.encode(), BPFFS.encode(), b"bpf", 0, b"mode=0700"), "mount", BPFFS)
    except OSError as error:
        raise UnsupportedError(f"{BPFFS} cannot be mounted: {os.strerror(error.errno or 0)}",
                               hint="tracking needs CONFIG_BPF_SYSCALL, and no container") from error


def _unmount_if_ours() -> None:
    if any(m.target == BPFFS and m.fstype == "bpf" and m.source == OUR_MOUNT for m in mounts.mounts()):
        with contextlib.suppress(OSError):
            if all(name.endswith(".debug") for name in os.listdir(BPFFS)):  # the kernel's own (CONFIG_BPF_PRELOAD)
                mounts.unmount(BPFFS)


class Hooks:
    """The loaded set: its maps, mapped tables, and what the kernel counts of its programs."""

    def __init__(self, directory: Path) -> None:
        """Open what is pinned. FileNotFoundError if any of it is missing."""
        self.directory = directory
        self._files = contextlib.ExitStack()
        try:
            self._table_fd = self._open("table")
            self._bitmaps = self._open("bitmaps")
            self._flight = self._open("flight")
            self._template = self._open("template")
            self.id = bpf.map_id(self._table_fd)
            self.table = bpf.map_memory(self._table_fd, layout.TABLE_SIZE)
        except BaseException:
            self._files.close()
            raise
        self._files.callback(self.table.close)

    def _open(self, name: str) -> int:
        fd = bpf.open_pinned(str(self.directory / name))
        self._files.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Give the descriptors back; what is pinned goes on."""
        self._files.close()

    # -- loading ----------------------------------------------------------------------------------

    @classmethod
    def load(cls, directory: Path) -> Hooks:
        """Load, attach and pin a new set; under the lock. UnsupportedError or PermissionDeniedError."""
        if directory.exists():
            remove(directory)  # and with the last set the file system, if it is ours
        ensure_mounted()
        try:
            directory.mkdir(mode=0o700)
            _load(directory)
            return cls(directory)
        except OSError as error:
            remove(directory)
            raise explain(error) from error
        except StasisError:
            remove(directory)
            raise

    def unload(self) -> None:
        """Detach everything; under the lock, when no device is left."""
        self.close()
        remove(self.directory)

    # -- what is there ----------------------------------------------------------------------------

    def missing(self) -> str:
        """The first program that is not attached any more; empty if all are."""
        try:
            pinned = set(os.listdir(self.directory))
        except OSError:
            pinned = set()
        return next((name for name in programs.PROGRAMS if not {f"link_{name}", f"program_{name}"} <= pinned), "")

    def program(self, name: str) -> bpf.ProgramInfo:
        """What the kernel counts of a program. FileNotFoundError if it is gone."""
        fd = bpf.open_pinned(str(self.directory / f"program_{name}"))
        try:
            return bpf.program_info(fd)
        finally:
            os.close(fd)

    # -- slots ------------------------------------------------------------------------------------

    def used_slots(self) -> list[int]:
        """Numbers of the slots in which a device is tracked."""
        return [index for index in range(SLOTS) if self.field(index, Slot.DEVICE)]

    def field(self, index: int, offset: int) -> int:
        """A 32-bit field of a slot."""
        return int(INDEX.unpack_from(self.table, slot_offset(index) + offset)[0])

    def set_field(self, index: int, offset: int, value: int) -> None:
        """Store a 32-bit field of a slot."""
        INDEX.pack_into(self.table, slot_offset(index) + offset, value)

    def was_set_up(self, index: int, read_activity: Callable[[], int]) -> bool:
        """Whether the kernel has counted less of a disk than it had: then the disk was set up anew, a sticky loss."""
        place = slot_offset(index) + Slot.ACTIVITY
        before: int = EPOCH.unpack_from(self.table, place)[0]  # first: others look, too, and what they see grows
        activity = read_activity()
        if 0 <= activity < before:
            self.set_field(index, Slot.LOST, self.field(index, Slot.LOST) | Lost.SET_UP)
            return True
        EPOCH.pack_into(self.table, place, max(activity, before))
        return False

    def add(self, name: str, device: int, start: int, end: int, shift: int, bio_based: bool) -> int:
        """Track sectors `start` to `end` of a disk in blocks of 2^shift sectors; returns the slot. Under the lock.

        UnsupportedError if all slots are taken; MemoryError or OSError without memory.
        """
        free = [index for index in range(SLOTS) if not self.field(index, Slot.DEVICE)]
        if not free:
            raise UnsupportedError(f"{name} cannot be tracked, {SLOTS} devices are",
                                   hint="stop one with stasis track stop")
        index = free[0]
        elements = layout.bitmap_elements((end - start + (1 << shift) - 1) >> shift)
        fd = bpf.create_map(bpf.MAP_TYPE_ARRAY, 4, layout.ELEMENT_SIZE, 2 * elements,
                            flags=bpf.F_MMAPABLE | bpf.F_INNER_MAP, name="stasis_bits")
        try:
            bpf.pin(fd, str(self.bits_path(index)))
            bpf.update(self._bitmaps, INDEX.pack(index), INDEX.pack(fd))
        finally:
            os.close(fd)
        at = slot_offset(index)
        struct.pack_into("<IIQQIIII", self.table, at, 0, 0, start, 0, shift, int(bio_based), elements, 0)
        for field, value in ((Slot.END, end), (Slot.ACTIVITY, 0)):
            struct.pack_into("<Q", self.table, at + field, value)
        self.draw_epoch()
        self.set_field(index, Slot.DEVICE, device)  # last: from here on it counts
        INDEX.pack_into(self.table, layout.COUNT, max(index + 1, self.count))
        self.wait_for_programs()
        return index

    def remove(self, index: int) -> None:
        """Track no longer; under the lock."""
        self.set_field(index, Slot.DEVICE, 0)
        with contextlib.suppress(FileNotFoundError):
            bpf.delete(self._bitmaps, INDEX.pack(index))
        self.bits_path(index).unlink(missing_ok=True)

    @property
    def count(self) -> int:
        """Slots that the programs look at."""
        return int(INDEX.unpack_from(self.table, layout.COUNT)[0])

    def bits_path(self, index: int) -> Path:
        """Pin of a slot's bitmaps."""
        return self.directory / f"bits_{index}"

    def map_bits(self, index: int) -> mmap.mmap:
        """Both bitmaps of a slot."""
        fd = bpf.open_pinned(str(self.bits_path(index)))
        try:
            return bpf.map_memory(fd, 2 * self.field(index, Slot.ELEMENTS) * layout.ELEMENT_SIZE)
        finally:
            os.close(fd)

    def draw_epoch(self) -> None:
        """What a program did before counts no longer as done. Before a bitmap or slot takes the place of another."""
        # Drawn and not counted: others do so at the same time, and it only has to be one that never was.
        EPOCH.pack_into(self.table, layout.EPOCH, secrets.randbits(63) * 2 + 1)

    # -- order ------------------------------------------------------------------------------------

    def wait_for_programs(self) -> None:
        """Return when every program that runs now has ended."""
        # Storing into a map of maps waits for an RCU grace period; the last element is there for that.
        bpf.update(self._bitmaps, INDEX.pack(SLOTS), INDEX.pack(self._template))

    def in_flight(self, device: int) -> list[tuple[int, int]]:
        """(sector, sectors) of the writes to a disk that takes bios which have not ended, or not visibly."""
        found = bpf.lookup_all(self._flight, layout.FLIGHT_KEY.size, layout.FLIGHT_VALUE.size, layout.FLIGHT_ENTRIES)
        pairs = [(layout.FLIGHT_KEY.unpack(key), layout.FLIGHT_VALUE.unpack(value)) for key, value in found]
        return [(value[0], value[1]) for key, value in pairs if key[1] == device]


def try_loading() -> None:
    """See whether the kernel takes the programs; nothing stays. Under the lock. The errors of `Hooks.load`."""
    Hooks.load(Path(BPFFS) / f"stasis-try-{os.getpid()}").unload()


def remove(directory: Path) -> None:
    """Unpin everything in a directory of pins; the bpf file system goes too if it was mounted for us."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(directory.iterdir()):
            path.unlink(missing_ok=True)
        directory.rmdir()
    _unmount_if_ours()


def _load(directory: Path) -> None:
    _raise_memlock()
    kernel = kerneltypes.read()
    with contextlib.ExitStack() as files:
        opened = {}
        for name, fd in _maps():
            files.callback(os.close, fd)
            opened[name] = fd
            bpf.pin(fd, str(directory / name))
        maps = Maps(opened["table"], opened["bitmaps"], opened["flight"], opened["done"])
        description, type_ids = btf.write_functions(FUNCTIONS)
        described = bpf.load_btf(description)
        files.callback(os.close, described)
        for name in programs.PROGRAMS:
            source = programs.assemble(name, kernel, maps, type_ids)
            target = kernel.events[programs.PROGRAMS[name]].target
            program = bpf.load_program(source.code, f"stasis_{name}", target, described, source.functions)
            files.callback(os.close, program)
            bpf.pin(program, str(directory / f"program_{name}"))
    # Completions come first: a write that is seen at its beginning is then seen at its end.
    for name in programs.PROGRAMS:
        _attach(directory, name)


def _attach(directory: Path, name: str) -> None:
    with contextlib.ExitStack() as files:
        program = bpf.open_pinned(str(directory / f"program_{name}"))
        files.callback(os.close, program)
        link = bpf.attach_raw(program)
        files.callback(os.close, link)
        bpf.pin(link, str(directory / f"link_{name}"))


def _maps() -> Iterator[tuple[str, int]]:
    yield "table", bpf.create_map(bpf.MAP_TYPE_ARRAY, 4, layout.TABLE_SIZE, 1, flags=bpf.F_MMAPABLE,
                                  name="stasis_table")
    yield "flight", bpf.create_map(bpf.MAP_TYPE_HASH, layout.FLIGHT_KEY.size, layout.FLIGHT_VALUE.size,
                                   layout.FLIGHT_ENTRIES, name="stasis_flight")
    yield "done", bpf.create_map(bpf.MAP_TYPE_PERCPU_ARRAY, 4, layout.Done.SIZE, 1, name="stasis_done")
    template = bpf.create_map(bpf.MAP_TYPE_ARRAY, 4, layout.ELEMENT_SIZE, 2,
                              flags=bpf.F_MMAPABLE | bpf.F_INNER_MAP, name="stasis_bits")
    yield "template", template
    yield "bitmaps", bpf.create_map(bpf.MAP_TYPE_ARRAY_OF_MAPS, 4, 4, SLOTS + 1, inner=template, name="stasis_bitmaps")


def _raise_memlock() -> None:
    """Kernels before 5.11 count maps as locked memory."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def explain(error: OSError) -> StasisError:
    """What a refusal of bpf(2) means."""
    lockdown = _lockdown()
    if error.errno in (1, 13) and lockdown:
        return UnsupportedError(f"the kernel is locked down ({lockdown}) and refuses to load BPF programs that trace",
                                hint="tracking works with lockdown=integrity, or without Secure Boot's lockdown")
    if error.errno == 1:
        return PermissionDeniedError("the kernel does not let this user load BPF programs",
                                     hint="run as root, outside of a container; CAP_BPF and CAP_PERFMON are needed")
    if error.errno == 38:
        return UnsupportedError("this kernel has no bpf(2)", hint="it was built without CONFIG_BPF_SYSCALL")
    return UnsupportedError(f"the kernel refuses the tracking programs: {error.strerror}",
                            hint="stasis track show --capabilities shows what is missing", errno=error.errno or 0)


def _lockdown() -> str:
    """The lockdown mode if it keeps programs from reading kernel memory."""
    try:
        text = Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return ""
    return "confidentiality" if "[confidentiality]" in text else ""
