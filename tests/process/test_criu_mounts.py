# SPDX-License-Identifier: Apache-2.0
"""Processes of one tree in different mount namespaces: CRIU restores what we dump, and we restore what it dumps. CRIU
keeps them where the first process has one of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.process.containers import container
from tests.process.programs import wait_for
from tests.process.sandboxes import rooted_script
from tests.process.test_criu_peer import _criu, needs_criu

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), pytest.mark.tool("unshare"), needs_criu]


@contextmanager
def _mounted(root: Path) -> Iterator[Path]:
    """CRIU wants a root that is mounted."""
    subprocess.run(["mount", "--bind", root, root], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", root], check=True)


def test_criu_restores_ours(tmp_path: Path) -> None:
    with container(tmp_path, "-pm", "sh", rooted_script(tmp_path)) as program:
        images = program.dump()
        with _mounted(tmp_path / "root") as root:
            _criu(images, "restore", "-d", "--root", root, "--external", "mnt[]", "--pidfile", tmp_path / "pid")
        program.pid = int((tmp_path / "pid").read_text())
        program.finish()


def test_we_restore_criu_s(tmp_path: Path) -> None:
    with container(tmp_path, "-pm", "sh", rooted_script(tmp_path)) as program:
        images = tmp_path / "images"
        images.mkdir()
        _criu(images, "dump", "-t", program.pid, "--external", "mnt[]")
        wait_for(lambda: not os.path.exists(f"/proc/{program.pid}"), "the first process did not end")
        program.restore(images, "--root", str(tmp_path / "root"))
        program.finish()
