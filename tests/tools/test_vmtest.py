# SPDX-License-Identifier: Apache-2.0
"""What `tools/vmtest` decides before it boots anything; what it does then is seen by running it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/vmtest"


@pytest.fixture(scope="module")
def vmtest() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("vmtest", str(SCRIPT))
    spec = importlib.util.spec_from_loader("vmtest", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def kernels(vmtest: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMTEST_DIR", str(tmp_path))
    for version in ("6.1.0-9-amd64", "6.1.0-56-amd64", "6.12.117+deb12-amd64"):
        directory = tmp_path / "kernels" / version
        directory.mkdir(parents=True)
        (directory / "initrd").touch()
    (tmp_path / "kernels" / "7.0.0-1-amd64").mkdir()  # a setup that was interrupted


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, "6.12.117+deb12-amd64"),
        ("6.1", "6.1.0-56-amd64"),
        ("6.12", "6.12.117+deb12-amd64"),
        ("6.1.0-9-amd64", "6.1.0-9-amd64"),
    ],
)
def test_newest_fitting_kernel_is_chosen(vmtest: ModuleType, wanted: str | None, chosen: str) -> None:
    assert vmtest.choose(wanted) == chosen


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("wanted", ["6.13", "7.0", "6.1.0-5"])
def test_kernel_that_is_not_set_up_says_what_to_run(vmtest: ModuleType, wanted: str) -> None:
    with pytest.raises(vmtest.Failure, match=f"setup {wanted}"):
        vmtest.choose(wanted)


def test_disk_with_limits(vmtest: ModuleType, tmp_path: Path) -> None:
    drive = vmtest.new_disk("64M,iops=1000,bps=32M", tmp_path / "disk")
    assert Path(drive.path).stat().st_size == 64 << 20
    assert drive.throttle == ",throttling.iops-total=1000,throttling.bps-total=32M"
    with pytest.raises(vmtest.Failure, match="SIZE"):
        vmtest.new_disk("64M,speed=1", tmp_path / "disk")


def test_help_and_mistakes_are_told() -> None:
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "virtual machine" in shown.stdout
    failed = subprocess.run([sys.executable, SCRIPT, "run"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr == "vmtest: no command; put it behind --\n"
