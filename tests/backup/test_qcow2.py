# SPDX-License-Identifier: Apache-2.0
"""Backups as qcow2 files, and qcow2 files as backups: qemu reads what we write, and we what qemu wrote."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.backup.repo import Manifest, Repository
from stasis.backup.streams import qemu
from stasis.backup.streams.image import receive_image
from stasis.backup.streams.newfile import new_file
from stasis.backup.streams.qcow_export import export_chain, export_whole
from stasis.backup.streams.qcow_import import ImportOptions, backing_chain, import_images
from stasis.backup.streams.receive import open_stream, receive
from stasis.backup.streams.send import send
from stasis.errors import (
    BusyError,
    DamagedError,
    ExitCode,
    NotFoundError,
    StasisError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from tests.backup.stored import CHUNK, backup_of, content_of
from tests.runner import Stasis

pytestmark = pytest.mark.tool("qemu-img", "qemu-nbd", "qemu-io")
SIZE = 24 * CHUNK + 1536


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with Repository.init(str(tmp_path / "r"), secret=None, chunk_size=CHUNK) as opened:
        yield opened


@pytest.fixture
def history(repository: Repository) -> list[tuple[Manifest, bytes]]:
    """Three backups: a full one with a hole, one with a few bytes and zeroes changed, one that has grown."""
    draw = random.Random(7)
    data = bytearray(draw.randbytes(SIZE))
    data[4 * CHUNK : 12 * CHUNK] = bytes(8 * CHUNK)
    contents = [bytes(data)]
    data[CHUNK + 100 : CHUNK + 104] = b"four"
    data[14 * CHUNK : 18 * CHUNK] = bytes(4 * CHUNK)
    contents.append(bytes(data))
    data[5 * CHUNK : 5 * CHUNK + 4096] = draw.randbytes(4096)
    contents.append(bytes(data) + draw.randbytes(2 * CHUNK))
    backups: list[tuple[Manifest, bytes]] = []
    for content in contents:
        parent = {"kind": "incremental", "parent": backups[-1][0].id} if backups else {}
        backups.append((backup_of(repository, content, **parent), content))
    return backups


def as_qemu_reads(path: Path) -> bytes:
    """The content of an image with all that it builds on, cut to no size."""
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    content = raw.read_bytes()
    raw.unlink()
    return content


def test_an_export_holds_the_backup_and_leaves_holes(repository: Repository, history: list[tuple[Manifest, bytes]],
                                                     tmp_path: Path) -> None:
    backup, content = history[0]
    result = export_whole(repository, backup, tmp_path / "disk.qcow2")
    assert as_qemu_reads(tmp_path / "disk.qcow2") == content
    assert result.bytes_data == SIZE - 8 * CHUNK
    assert (tmp_path / "disk.qcow2").stat().st_blocks * 512 < SIZE - 7 * CHUNK + 8 * CHUNK


def test_no_file_is_made_where_a_device_was_meant() -> None:
    path = Path("/dev/no-such-device-of-stasis")
    with pytest.raises(NotFoundError, match="there is no device"), new_file(path):
        pass
    assert not path.exists()


def test_a_chain_is_a_file_per_increment_and_each_shows_its_backup(
        repository: Repository, history: list[tuple[Manifest, bytes]], tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    first = export_chain(repository, [backup for backup, _ in history[:2]], folder)
    then = export_chain(repository, [backup for backup, _ in history], folder)
    assert [file.known for file in first + then] == [False, False, True, True, False]
    for backup, content in history:
        assert as_qemu_reads(folder / f"{backup.id}.qcow2") == content
    assert [file.bytes_data for file in [*first, then[2]]] == [SIZE - 8 * CHUNK, 4096, 4096 + 2 * CHUNK + 1536]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{backup.id}.qcow2" for backup, _ in history)


def test_a_disk_that_shrank_shows_nothing_of_what_was_behind_its_end(repository: Repository, tmp_path: Path) -> None:
    """Its size is no multiple of 512, so the image is a little longer than the backup."""
    (folder := tmp_path / "images").mkdir()
    backups = [backup_of(repository, b"x" * size) for size in (3 * CHUNK, CHUNK + 201, 2 * CHUNK)]
    export_chain(repository, backups, folder)
    assert as_qemu_reads(folder / f"{backups[1].id}.qcow2") == b"x" * (CHUNK + 201) + bytes(311)
    assert as_qemu_reads(folder / f"{backups[2].id}.qcow2") == b"x" * 2 * CHUNK


def test_a_chain_over_another_folder_is_not_mixed_up(repository: Repository, history: list[tuple[Manifest, bytes]],
                                                     tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    (one, _), (two, _), (three, _) = history
    export_chain(repository, [one, three], folder)
    with pytest.raises(BusyError, match=f"builds on {one.id}.qcow2, not on {two.id}.qcow2"):
        export_chain(repository, [one, two, three], folder)


def test_what_fails_leaves_no_file(repository: Repository, history: list[tuple[Manifest, bytes]],
                                   tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    backup, _ = history[0]
    chunk = repository.index(backup).name(20).hex()
    (tmp_path / "r" / "chunks" / chunk[:2] / chunk).unlink()
    with pytest.raises(DamagedError, match=chunk):
        export_whole(repository, backup, folder / "disk.qcow2")
    with pytest.raises(DamagedError, match=chunk):
        export_chain(repository, [backup], folder)
    assert list(folder.iterdir()) == []
    (folder / "disk.qcow2").write_text("precious")
    with pytest.raises(BusyError):
        export_whole(repository, backup, folder / "disk.qcow2")
    with pytest.raises(NotFoundError, match="is no directory"):
        export_chain(repository, [backup], folder / "disk.qcow2")
    with pytest.raises(StasisError, match=r"nowhere/disk.qcow2 cannot be written: No such file"):
        export_whole(repository, backup, tmp_path / "nowhere" / "disk.qcow2")


def test_two_exports_to_one_file_are_one_too_many_and_leftovers_are_none(
        repository: Repository, history: list[tuple[Manifest, bytes]], tmp_path: Path) -> None:
    """What a killed export left under the hidden name is written over; what one that runs writes there is not."""
    backup, content = history[0]
    with (tmp_path / ".disk.qcow2.part").open("w+b") as left:
        left.write(b"x" * SIZE * 2)
        left.flush()
        fcntl.flock(left, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="is being written by another command"):
            export_whole(repository, backup, tmp_path / "disk.qcow2")
    export_whole(repository, backup, tmp_path / "disk.qcow2")
    assert as_qemu_reads(tmp_path / "disk.qcow2") == content
    assert not (tmp_path / ".disk.qcow2.part").exists()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "stasis-test", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_full_disk_leaves_no_file_and_no_backup(repository: Repository, history: list[tuple[Manifest, bytes]],
                                                  small: Path) -> None:
    backup, _ = history[0]
    with pytest.raises(StorageError, match="No space left on device"):
        export_whole(repository, backup, small / "disk.qcow2")
    send(repository, backup, None, stream := io.BytesIO())
    with pytest.raises(StorageError, match=r"disk.img cannot be written: No space left on device"):
        receive_image(open_stream(io.BufferedReader(io.BytesIO(stream.getvalue()))), small / "disk.img")
    assert list(small.iterdir()) == []
    with Repository.init(str(small / "r"), secret=None) as target:
        with pytest.raises(StorageError, match="No space left on device"):
            receive(target, open_stream(io.BufferedReader(io.BytesIO(stream.getvalue()))))
        assert target.backups() == []


def test_a_chain_of_qemu_becomes_increments(repository: Repository, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top:1.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", base], check=True, capture_output=True)
    backing = ["-b", "base.qcow2", "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(top), "12M"], check=True)
    writes = ["-c", "write -P 9 2M 64K", "-c", "write -z 3M 1M", "-c", "write -P 5 11M 64K"]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, str(top)], check=True, capture_output=True)
    chain = backing_chain(top, "qcow2", follow=True)
    assert chain == [base, top]
    first, second = import_images(repository, chain, ImportOptions("disk", tags=("moved",)))
    assert (first.kind, first.bytes_data, second.kind, second.bytes_data) == ("full", 3 << 20, "incremental", 2 * CHUNK)
    content = bytearray(8 << 20)
    content[1 << 20 : 4 << 20] = b"\7" * (3 << 20)
    one, two = repository.backups()
    assert content_of(repository, one) == content
    content += bytes(4 << 20)
    content[2 << 20 : (2 << 20) + CHUNK] = b"\x09" * CHUNK
    content[3 << 20 : 4 << 20] = bytes(1 << 20)
    content[11 << 20 : (11 << 20) + CHUNK] = b"\5" * CHUNK
    assert content_of(repository, two) == content
    assert (two.parent, two.device, two.tags) == (one.id, "disk", ("moved",))


def a_history(draw: random.Random) -> Iterator[bytes]:
    """A disk that grows, shrinks, gets data and zeroes anywhere; never empty."""
    data = bytearray(draw.randbytes(draw.randrange(1, 12 * CHUNK)))
    for _ in range(4):
        yield bytes(data)
        size = draw.choice([len(data), draw.randrange(1, 14 * CHUNK)])
        data = data[:size].ljust(size, b"\0")
        for _ in range(draw.randrange(4)):
            start = draw.randrange(size)
            length = min(draw.choice([1, 4096, CHUNK, 3 * CHUNK]), size - start)
            data[start : start + length] = draw.choice([bytes(length), draw.randbytes(length)])


def test_any_history_goes_into_a_chain_and_comes_back(repository: Repository, tmp_path: Path, seed: int) -> None:
    (folder := tmp_path / "images").mkdir()
    contents = list(a_history(random.Random(seed)))
    files = export_chain(repository, [backup_of(repository, content) for content in contents], folder)
    padded = [content + bytes(-len(content) % 512) for content in contents]
    assert [as_qemu_reads(Path(file.path)) for file in files] == padded
    chain = backing_chain(Path(files[-1].path), "qcow2", follow=True)
    imported = import_images(repository, chain, ImportOptions("copy"))
    assert [content_of(repository, repository.backup(one.id)) for one in imported] == padded


def test_other_files_are_read_only_on_request(tmp_path: Path) -> None:
    secret, image = tmp_path / "secret", tmp_path / "image.qcow2"
    secret.write_bytes(b"x" * 4096)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", image], check=True)
    with pytest.raises(UsageError, match="builds on"):
        backing_chain(image, "qcow2", follow=False)
    with pytest.raises(UsageError, match="which is no qcow2 file"):
        backing_chain(image, "qcow2", follow=True)
    data = ["-o", f"data_file={tmp_path / 'data'},data_file_raw=on"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *data, tmp_path / "split.qcow2", "1M"], check=True)
    with pytest.raises(UsageError, match="keeps its data in another file"):
        backing_chain(tmp_path / "split.qcow2", "qcow2", follow=True)
    with pytest.raises(NotFoundError):
        backing_chain(tmp_path / "missing.qcow2", "qcow2", follow=True)


def test_an_image_that_builds_on_itself_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", loop, "1M"], check=True)
    rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "loop.qcow2"]
    subprocess.run([*rebase, loop], check=True)
    with pytest.raises(UsageError, match="builds on itself"):
        backing_chain(loop, "qcow2", follow=True)


def test_what_qemu_refuses_is_said_in_its_words(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(4096))
    with pytest.raises(StasisError, match=r"noise cannot be read: .*qcow2"):
        backing_chain(tmp_path / "noise", "qcow2", follow=False)
    with pytest.raises(StasisError, match=r"noise: .*qcow2"):
        import_images(repository, [tmp_path / "noise"], ImportOptions("disk"))
    assert repository.backups() == []
    assert repository.locks() == []


def test_without_qemu_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="qemu-img is not installed") as caught:
        qemu.create(tmp_path / "x", 512, None)
    assert "qemu-utils" in caught.value.hint


def test_the_commands_export_and_import_a_chain(stasis: Stasis, short_dir: Path) -> None:
    where = ["--repo", f"{short_dir}/r"]
    stasis("repo", "init", f"{short_dir}/r", "--no-encryption")
    (short_dir / "disk.img").write_bytes(b"one" * 1024)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", short_dir / "disk.img", short_dir / "a.qcow2"],
                   check=True)
    stasis("backup", "import", short_dir / "a.qcow2", "--name", "disk", *where)
    (short_dir / "images").mkdir()
    stasis("backup", "export", "latest", short_dir / "b.qcow2", *where)
    assert as_qemu_reads(short_dir / "b.qcow2")[:3072] == b"one" * 1024
    said = stasis("backup", "export", "latest", short_dir / "images", "--chain", "--json", *where).splitlines()
    [file] = json.loads(said[-1])["files"]
    assert as_qemu_reads(Path(file["path"])) == as_qemu_reads(short_dir / "b.qcow2")
    assert "give --chain" in stasis.fail(ExitCode.USAGE, "backup", "export", "latest", "latest", "x.qcow2", *where)
