# SPDX-License-Identifier: Apache-2.0
"""dattobd's incremental mode on devices in use: the image is the device, transition after transition."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stasis as api
from stasis.cli import update_img
from stasis.cli.main import main
from stasis.datto.cowreader import CowReader
from stasis.errors import ExitCode, StasisError
from stasis.live import tracking
from tests.daemon.helpers import await_true, kill
from tests.live.disks import CHECK, formatted, loop, mounted, put_number, tool, writing
from tests.live.writers import MIB, Writers, bpf_works, loop_device, read_direct, state_directory
from tests.runner import Stasis
from tests.unmounting import unmount

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

LONG = bool(os.environ.get("STASIS_LONG"))
SIZE = 16 * MIB + 4096 * 3


@pytest.fixture
def live(stasis: Stasis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stasis]:
    for name in ("STASIS_RUN_DIR", "STASIS_STATE_DIR"):
        monkeypatch.setenv(name, stasis.environment[name])
    with state_directory(stasis.state_dir):
        yield stasis
        stasis.stop()


@pytest.fixture
def client(live: Stasis) -> Iterator[api.Client]:
    with api.connect(live.run_dir, live.state_dir) as client:
        yield client


@pytest.fixture
def node(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "backing", SIZE) as node:
        yield node


def _errno(call: Callable[[], object]) -> int:
    with pytest.raises(StasisError) as caught:
        call()
    return caught.value.errno


def _next(client: api.Client, directory: Path, number: int, image: Path) -> int:
    """On to snapshot `number`, and the image with it; how many blocks that were."""
    if client.datto_info(0).state == 3:
        client.datto_to_incremental(0)
    tracer = client.datto_to_snapshot(0, directory / f"cow{number}")
    assert (tracer.state, tracer.seqid, tracer.live) == (3, number, True)
    before = str(directory / f"cow{number - 1}")
    with CowReader(before, image.stat().st_size) as reader:
        changed = reader.header.changed_blocks
    assert update_img.main(["/dev/datto0", before, str(image)]) == 0
    assert client.datto_to_incremental(0).state == 2
    assert not os.path.exists(tracer.point)
    return changed


def test_the_image_of_a_mounted_ext4_is_whole_at_every_snapshot(client: api.Client, tmp_path: Path) -> None:
    image, durable = tmp_path / "image", 0

    def write(number: int) -> None:
        nonlocal durable
        put_number(disk.directory / "number", number)
        (disk.directory / f"file{number % 20}").write_bytes(os.urandom(20000))
        if number % 7 == 0:
            os.sync()
        durable = number

    with formatted("ext4", tmp_path) as disk:
        with writing(write) as wrote:
            client.datto_setup_live(0, disk.node, tmp_path / "cow1", image)
            for number in range(2, 30 if LONG else 4):
                wrote.clear()
                assert wrote.wait(30)
                known = durable
                assert _next(client, tmp_path, number, image) > 0
                shutil.copy(image, tmp_path / "copy")
                with loop(tmp_path / "copy") as copied, mounted(copied, tmp_path / "mounted") as directory:
                    assert int((directory / "number").read_text()) >= known
                tool(*CHECK["ext4"], tmp_path / "copy")
        unmount(disk.directory)
        try:
            _next(client, tmp_path, number + 1, image)
            assert image.read_bytes() == read_direct(disk.node, 0, os.path.getsize(image))
        finally:
            tool("mount", disk.node, disk.directory)
        client.datto_destroy(0)
        assert not (tmp_path / f"cow{number + 1}").exists()


def test_every_write_is_in_the_next_image_through_restarts_and_deaths(live: Stasis, node: str, tmp_path: Path,
                                                                     seed: int) -> None:
    image = tmp_path / "image"
    with api.connect(live.run_dir, live.state_dir) as client:
        client.datto_setup_live(0, node, tmp_path / "cow1", image)
        assert image.read_bytes() == read_direct(node, 0, SIZE)
    for number in range(2, 40 if LONG else 4):
        with api.connect(live.run_dir, live.state_dir) as client:
            Writers([node], seed + number).run(6, lambda: None)
            assert client.datto_info(0).changed > 0
            _end(live, client, number)
        with api.connect(live.run_dir, live.state_dir) as client:
            assert client.datto_info(0).state == 2
            assert _next(client, tmp_path, number, image) > 0
            assert image.read_bytes() == read_direct(node, 0, SIZE), number
            assert client.datto_info(0).changed == 0


def _end(live: Stasis, client: api.Client, number: int) -> None:
    pid = live.daemon_pid()
    assert pid is not None
    if number % 3 == 0:
        client.stop()
        await_true(lambda: live.daemon_pid() is None)
    elif number % 3 == 2:
        kill(pid)


def test_it_waits_after_a_boot_until_its_map_is_taken_up(live: Stasis, node: str, tmp_path: Path) -> None:
    with api.connect(live.run_dir, live.state_dir) as client:
        assert live("datto", "setup", "--live", "--image", tmp_path / "image", node, tmp_path / "cow1") == "0"
        client.datto_to_snapshot(0, tmp_path / "cow2")
        client.stop()
        await_true(lambda: live.daemon_pid() is None)
    record = live.state_dir / "live" / os.path.basename(node) / "device.json"
    before = record.read_text()
    record.write_text(json.dumps({**json.loads(before), "boot": "another"}))
    with api.connect(live.run_dir, live.state_dir) as client:
        assert [(tracer.state_name, tracer.error) for tracer in client.datto_list()] == [("unverified snapshot", 0)]
        assert _errno(lambda: client.datto_to_incremental(0)) == errno.EINVAL
        record.write_text(before)
        assert client.datto_list()[0].state_name == "active snapshot"
        assert live.json("datto", "changes", tmp_path / "cow1") == []
        assert _next(client, tmp_path, 3, tmp_path / "image") == 0


@pytest.mark.parametrize("words", [
    "--live /dev/sdb cow", "--image image /dev/sdb cow", "--live --image image --group a cow b cow2",
    "--live --image image --allocate 1M /dev/sdb cow", "--live --image image --cache 1M /dev/sdb cow",
])
def test_options_that_make_no_sense_together_are_refused(words: str) -> None:
    assert main(["datto", "setup", *words.split()]) == ExitCode.USAGE


def test_what_needs_old_contents_is_refused(client: api.Client, node: str, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    cow, image = tmp_path / "cow", tmp_path / "image"
    assert _errno(lambda: client.datto_setup_live(24, node, cow, image)) == errno.EINVAL
    assert _errno(lambda: client.datto_setup_live(0, tmp_path / "none", cow, image)) == errno.ENOENT
    assert _errno(lambda: client.datto_setup_live(0, tmp_path / "letter", cow, image)) == errno.ENOTBLK
    assert _errno(lambda: client.datto_setup_live(0, node, tmp_path / "letter", image)) == errno.EEXIST
    assert _errno(lambda: client.datto_setup_live(0, node, cow, tmp_path / "letter")) == errno.EINVAL
    assert _errno(lambda: client.datto_setup([(0, node, cow)])) == errno.EINVAL
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["backing", "letter"]
    client.datto_setup_live(0, node, cow, image)
    assert _errno(lambda: client.datto_setup_live(0, node, tmp_path / "other", tmp_path / "copy")) == errno.EBUSY
    assert _errno(lambda: client.datto_setup_live(1, node, tmp_path / "other", tmp_path / "copy")) == errno.EINVAL
    assert _errno(lambda: client.datto_to_incremental(0)) == errno.EINVAL
    assert _errno(lambda: client.datto_expand(0, 1)) == errno.EINVAL
    assert _errno(lambda: client.datto_to_snapshot(0, cow)) == errno.EBUSY
    client.datto_to_snapshot(0, tmp_path / "cow2", fallocated_space=1)
    assert (tmp_path / "cow2").stat().st_size == MIB
    for call in (lambda: client.datto_to_snapshot(0, tmp_path / "cow3"), lambda: client.datto_expand(0, 1),
                 lambda: client.datto_auto_expand(0, 1)):
        assert _errno(call) == errno.EINVAL
    client.datto_reconfigure(0, 1 << 20)
    client.datto_destroy(0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["backing", "cow", "image", "letter"]


def test_a_cow_file_on_the_device_itself_is_refused(client: api.Client, tmp_path: Path) -> None:
    with formatted("ext4", tmp_path) as disk:
        assert _errno(lambda: client.datto_setup_live(0, disk.node, disk.directory / "cow", tmp_path / "i")) == (
            errno.EINVAL)
        assert _errno(lambda: client.datto_setup_live(0, disk.node, tmp_path / "cow", disk.directory / "i")) == (
            errno.EBUSY)
        assert sorted(path.name for path in disk.directory.iterdir()) == ["lost+found"]
        assert not (tmp_path / "cow").exists()


def test_a_series_whose_tracking_ended_says_so(live: Stasis, client: api.Client, node: str, tmp_path: Path) -> None:
    client.datto_setup_live(0, node, tmp_path / "cow", tmp_path / "image")
    tracking.stop(node, live.state_dir)
    found = client.datto_info(0)
    assert (found.error, "is not tracked" in found.reason) == (-errno.EINVAL, True)
    tracking.start(node, live.state_dir).close()
    assert _errno(lambda: client.datto_to_snapshot(0, tmp_path / "cow2")) == errno.EINVAL
    assert client.datto_info(0).error == -errno.EINVAL
    assert not (tmp_path / "cow2").exists()
    client.datto_destroy(0)
