# SPDX-License-Identifier: Apache-2.0
"""Memory that was sealed with mseal(2) is what it was after a restore, and sealed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stasis.errors import DamagedError, ExitCode
from stasis.process.images.imageset import ImageSet
from stasis.process.images.schema.inventory import InventoryEntry
from stasis.process.images.schema.memory import SealEntry
from stasis.process.images.setwriter import ImageSetWriter
from stasis.process.seals import has_sealed_system
from tests.process.programs import Program, compiled, running, stasis

SEALED = r"""
#ifndef SYS_mseal
#define SYS_mseal 462
#endif
static char *make(int protection, int flags, int file) {
    char *memory = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, flags, file, 0);
    CHECK(memory != MAP_FAILED);
    snprintf(memory, 100, "kept %d", flags);
    if (syscall(SYS_mseal, memory + 4096, 0, 0) && errno == ENOSYS) touch("none");
    CHECK(!mprotect(memory, 3 * 4096, protection));
    return memory;
}
static void seal(char *memory) { CHECK(!syscall(SYS_mseal, memory, 2 * 4096, 0) || !access("none", F_OK)); }
static void is_sealed(char *memory) {
    CHECK(munmap(memory, 4096) && errno == EPERM);
    CHECK(mprotect(memory + 4096, 4096, PROT_NONE) && errno == EPERM);
    CHECK(mmap(memory, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED);
    CHECK(mremap(memory, 4096, 8192, MREMAP_MAYMOVE) == MAP_FAILED);
    CHECK(!munmap(memory + 2 * 4096, 4096));
}
int main(void) {
    int file = open("file", O_CREAT | O_RDWR, 0600);
    CHECK(!ftruncate(file, 3 * 4096));
    char *own = make(PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1), *shared = make(PROT_READ, MAP_SHARED, file);
    char *hidden = make(PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1), *open_ = make(3, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    char *all[] = {own, shared, hidden, open_};
    for (int i = 0; i < 4; i++) seal(all[i]);
    pid_t child = fork();
    if (child) set_up(); else await("go");
    strcpy(open_ + 100, "can be written");
    CHECK(!strcmp(own, "kept 34") && !strcmp(shared, "kept 1") && !strcmp(open_, "kept 34"));
    for (int i = 0; i < 4; i++) is_sealed(all[i]);
    if (!child) _exit(0);
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    return content();
}
"""


def _needs_seals(program: Program) -> None:
    if (program.directory / "none").exists():
        pytest.skip("needs Linux 6.10")


def _written(path: Path, pid: int, start: int, end: int) -> Path:
    with ImageSetWriter(path) as out:
        out.write("stasis-seals", SealEntry(start=start, end=end), number=pid)
        out.write("inventory", InventoryEntry(img_version=2))
        out.commit(durable=False)
    return path / f"stasis-seals-{pid}.img"


@pytest.mark.root
@pytest.mark.tool("gcc")
def test_sealed_memory(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, SEALED)) as program:
        _needs_seals(program)
        program.again_and_again()
        program.finish()


@pytest.mark.root
@pytest.mark.tool("gcc")
def test_seals_are_no_way_to_other_memory(tmp_path: Path) -> None:
    """An image that names memory which is not there is damaged, and nothing comes of the restore."""
    with running(tmp_path, compiled(tmp_path, SEALED)) as program:
        _needs_seals(program)
        images = program.dump()
        path = images / f"stasis-seals-{program.pid}.img"
        path.write_bytes(_written(tmp_path / "other", program.pid, 0x10000, 0x20000).read_bytes())
        said = stasis("restore", "--images", images, status=ExitCode.DAMAGED)
        assert path.name in said
        assert not Path(f"/proc/{program.pid}").exists()


def test_the_image_is_read_as_others_are(tmp_path: Path) -> None:
    path = _written(tmp_path / "set", 7, 4096, 8192)
    assert path.read_bytes().hex() == "194356545345414c06000000088020108040"
    (entry,) = ImageSet.open(tmp_path / "set").messages("stasis-seals", 7)
    assert (entry.start, entry.end) == (4096, 8192)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="stasis-seals-7"):
        ImageSet.open(tmp_path / "set").messages("stasis-seals", 7)


@pytest.mark.parametrize(("flags", "sealed"), [("rd ex mr mw me de sd sl", True), ("rd ex mr mw me de sd", False)])
def test_a_kernel_that_seals_its_own_mappings_is_known(flags: str, sealed: bool) -> None:
    smaps = f"""7ffd0000-7ffd1000 rw-p 00000000 00:00 0 [stack]
VmFlags: rd wr mr mw me gd ac sl
7ffff000-7ffff800 r-xp 00000000 00:00 0                          [vdso]
Size:                  8 kB
VmFlags: {flags}
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0          [vsyscall]
VmFlags: ex sl
"""
    assert has_sealed_system(smaps.encode()) is sealed
