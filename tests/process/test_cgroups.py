# SPDX-License-Identifier: Apache-2.0
"""Processes come back in the control groups that they were in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.linux.mounts import mounts
from stasis.process import cgroups
from tests.process.programs import compiled, running, stasis, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

CODE = r"""
int main(void) {
    pid_t child = fork();
    if (!child) { touch("child"); await("go"); _exit(0); }
    await("child");
    set_up();
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    return content();
}
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of the second version, or of a hierarchy of the first that limits nothing."""
    found = [mount.target for mount in mounts() if mount.fstype == "cgroup2" and not mount.read_only]
    if not found:
        pytest.skip("there are no control groups to make here")
    path = Path(found[0]) / f"stasis-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError:
        pytest.skip("there are no control groups to make here")
    try:
        yield path
    finally:
        wait_for(lambda: not (path / "cgroup.procs").read_text(), "the group is not empty")
        path.rmdir()


def _path_of(pid: int) -> str:
    return dict(cgroups.groups_of(pid))[""]


def test_each_process_is_in_its_group(tmp_path: Path, group: Path) -> None:
    with running(tmp_path, compiled(tmp_path, CODE)) as program:
        (child,) = program.descendants()[1:]
        outside = _path_of(program.pid)
        (group / "cgroup.procs").write_text(str(child))
        images = program.dump()
        group.rmdir()
        program.restore(images)
        assert _path_of(program.pid) == outside
        assert _path_of(child).endswith(f"/{group.name}")
        images = program.dump()
        stasis("restore", "--images", images, "--manage-cgroups", "ignore")
        assert _path_of(child) == outside
        program.finish()


def test_a_set_of_criu_has_the_groups_with_its_threads(tmp_path: Path, group: Path) -> None:
    with running(tmp_path, compiled(tmp_path, CODE)) as program:
        (child,) = program.descendants()[1:]
        (group / "cgroup.procs").write_text(str(child))
        images = program.dump()
        core = json.loads(stasis("decode", images / f"core-{child}.img"))
        core["entries"][0]["thread_core"]["cg_set"] = core["entries"][0]["tc"].pop("cg_set")
        (tmp_path / "edited").write_text(json.dumps(core))
        stasis("encode", tmp_path / "edited", "--output", images / f"core-{child}.img")
        program.restore(images)
        assert _path_of(child).endswith(f"/{group.name}")
        program.finish()


def test_a_group_that_is_frozen_holds_nobody(tmp_path: Path, group: Path) -> None:
    with running(tmp_path, compiled(tmp_path, CODE)) as program:
        (child,) = program.descendants()[1:]
        (group / "cgroup.procs").write_text(str(child))
        images = program.dump()
        (group / "cgroup.freeze").write_text("1")
        program.restore(images)
        assert _path_of(child) == _path_of(program.pid)
        program.finish()
