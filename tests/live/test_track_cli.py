# SPDX-License-Identifier: Apache-2.0
"""`stasis track` and `stasis map` of tracked devices, as a user calls them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.cli.main import main
from stasis.errors import ExitCode
from stasis.live.tracker import Tracker
from tests.live.writers import MIB, bpf_works, loop_device, state_directory

pytestmark = [pytest.mark.root, pytest.mark.skipif(not bpf_works(), reason="needs BTF and loop devices")]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def where(tmp_path: Path) -> Iterator[list[str]]:
    with state_directory(tmp_path / "state") as state:
        yield ["--state-dir", str(state)]


def test_from_start_to_stop(where: list[str], tmp_path: Path, capsys: Capture) -> None:
    with loop_device(tmp_path / "image", 16 * MIB) as node:
        def run(*words: str) -> str:
            assert main([*words, *where]) == ExitCode.OK
            return capsys.readouterr().out

        assert "is tracked, in blocks of 64 KiB" in run("track", "start", node)
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        os.pwrite(fd, b"x" * 4096, 3 * 65536)
        os.fsync(fd)
        os.close(fd)
        [device] = json.loads(run("track", "list", "--json"))
        assert (device["path"], device["changed_blocks"], device["lost"]) == (node, 1, "")
        run("map", "mark", node, "1M:64K")
        changed = json.loads(run("map", "changed", node, "--since", "0", "--json"))
        assert changed == [{"offset": 196608, "length": 65536}, {"offset": MIB, "length": 65536}]
        run("map", "read", node, "--output", str(tmp_path / "map"))
        assert (tmp_path / "map").read_bytes() == bytes(1 if block in (3, 16) else 0 for block in range(256))
        assert json.loads(run("map", "info", node, "--json"))["block_count"] == 256
        assert main(["track", "start", node, *where]) == ExitCode.BUSY
        assert main(["map", "changed", node, "--since", "0", "--held", *where]) == ExitCode.USAGE
        run("track", "stop", node)
        assert main(["track", "show", node, *where]) == ExitCode.NOT_FOUND


def test_several_devices_are_tracked_or_let_go_together(where: list[str], tmp_path: Path, capsys: Capture) -> None:
    def tracked() -> list[str]:
        assert main(["track", "list", "--json", *where]) == ExitCode.OK
        return [device["path"] for device in json.loads(capsys.readouterr().out)]

    with loop_device(tmp_path / "one", MIB) as one, loop_device(tmp_path / "two", MIB) as two:
        link = tmp_path / "link"
        link.symlink_to(one)
        assert main(["track", "start", one, two, str(link), *where]) == ExitCode.USAGE
        assert f"{link} is the same device as {one}" in capsys.readouterr().err
        assert main(["track", "start", one, str(tmp_path / "none"), *where]) == ExitCode.NOT_FOUND
        assert main(["track", "start", two, *where]) == ExitCode.OK
        assert main(["track", "start", one, two, *where]) == ExitCode.BUSY
        assert "is tracked already" in capsys.readouterr().err
        assert tracked() == [two]  # as it was before
        assert main(["track", "start", one, *where]) == ExitCode.OK
        assert main(["track", "stop", one, str(tmp_path / "none"), *where]) == ExitCode.NOT_FOUND
        with Tracker.open(two, Path(where[1])):  # as a backup has it
            assert main(["track", "stop", one, two, *where]) == ExitCode.BUSY
        capsys.readouterr()
        assert set(tracked()) == {one, two}
        assert main(["track", "stop", one, two, str(link), *where]) == ExitCode.OK
        assert tracked() == []


def test_capabilities_are_found_by_trying(where: list[str], capsys: Capture) -> None:
    assert main(["track", "show", "--capabilities", "--json", *where]) == ExitCode.OK
    found = {one["name"]: one["available"] for one in json.loads(capsys.readouterr().out)}
    assert found["tracking programs"]
    assert found["tracepoint block_rq_complete"]


@pytest.mark.parametrize("words", ["info", "read --output map", "changed --since 0", "mark 0:1M"])
def test_the_map_of_what_is_not_tracked_is_refused_in_one_sentence(where: list[str], words: str, tmp_path: Path,
                                                                  capsys: Capture) -> None:
    verb, *rest = words.split()
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    with loop_device(tmp_path / "image", MIB) as node:
        for path, said in ((node, f"stasis track start {node}"), (str(plain), "no block device"),
                           (str(tmp_path / "none"), f"there is no {tmp_path}/none")):
            assert main(["map", verb, path, *rest, *where]) == ExitCode.NOT_FOUND
            assert said in capsys.readouterr().err
