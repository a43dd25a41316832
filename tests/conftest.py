# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share: short run directories, the command line, and a look at what is left behind.

Unix socket paths hold 108 bytes, too few for pytest's own temporary directories; `run_dir` is short enough.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import random
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import hypothesis.core
import pytest

from tests import leaks
from tests.runner import Stasis

DIST_PACKAGES = Path("/usr/lib/python3/dist-packages")
MODULE_NODES = {"blksnap": ("blksnap-control", "blksnap"), "dattobd": ("datto-ctl",)}
SUSPICIOUS = re.compile(r"Traceback \(most recent|\b(ERROR|CRITICAL)\b|Exception ignored|ResourceWarning")

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, print_blob=True, max_examples=5000)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A clean environment, and a seed that is printed, so that any run can be repeated. Long runs have their time."""
    if os.environ.get("STASIS_LONG"):
        os.environ.setdefault("PYTEST_TIMEOUT", "7200")  # pytest-timeout looks at it after us
    for name in [name for name in os.environ if name.startswith(("STASIS_RUN", "STASIS_STATE", "LISTEN_"))]:
        del os.environ[name]
    os.environ[leaks.SESSION_VARIABLE] = f"{os.getpid()}-{secrets.token_hex(4)}"
    os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"  # mkfs, losetup for ordinary users
    hypothesis.settings.load_profile(os.environ.get("STASIS_HYPOTHESIS_PROFILE", "default"))
    if hypothesis.core.global_force_seed is None:
        drawn = random.SystemRandom().randrange(1 << 32)
        hypothesis.core.global_force_seed = getattr(config, "workerinput", {}).get("seed", drawn)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Processes that share the tests (pytest-xdist) have one seed, the one that is printed."""
    node.workerinput["seed"] = hypothesis.core.global_force_seed


def pytest_report_header() -> str:
    return f"seed of random tests: {hypothesis.core.global_force_seed} (repeat with --hypothesis-seed=SEED)"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this host cannot run, and say why."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")
    if item.get_closest_marker("vm") and os.environ.get("STASIS_VMTEST") != "1":
        pytest.skip("runs in a virtual machine; make vmtest")
    for marker in item.iter_markers("kernel_module"):
        if not any(Path("/dev", node).exists() for node in MODULE_NODES[marker.args[0]]):
            pytest.skip(f"needs the kernel module {marker.args[0]}, which is not loaded")
    missing = [n for marker in item.iter_markers("tool") for n in marker.args if shutil.which(n) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; make deps installs it")


@pytest.fixture
def seed() -> int:
    """The seed of this session, printed in the report's header, for tests that draw without hypothesis."""
    return int(hypothesis.core.global_force_seed or 0)


@pytest.fixture(scope="session")
def session_dir() -> Iterator[Path]:
    """A directory with a path of a dozen bytes that holds every `short_dir`."""
    path = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def short_dir(session_dir: Path) -> Iterator[Path]:
    """A directory for one test whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="", dir=session_dir))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def run_dir(short_dir: Path) -> Path:
    path = short_dir / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def state_dir(short_dir: Path) -> Path:
    path = short_dir / "state"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def stasis(run_dir: Path, state_dir: Path, checklogs: None) -> Iterator[Stasis]:
    """The command line on run and state directories of its own; everything it started ends with the test."""
    runner = Stasis(run_dir, state_dir)
    yield runner
    runner.stop()


@pytest.fixture
def checklogs(run_dir: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test when a process logged an error that `expects_errors(PATTERN...)` does not announce."""
    yield
    expected = [pattern for marker in request.node.iter_markers("expects_errors") for pattern in marker.args]
    found = [line for path in sorted(run_dir.rglob("*.log")) for line in _suspicious(path, expected)]
    assert not found, "suspicious lines were logged:\n" + "\n".join(found)


def _suspicious(log: Path, expected: list[str]) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    if any(re.search(pattern, line) for pattern in expected for line in lines):
        lines = [line for line in lines if "Traceback" not in line]  # it belongs to the expected error
    return [
        f"{log.name}: {line}"
        for line in lines
        if SUSPICIOUS.search(line) and not any(re.search(pattern, line) for pattern in expected)
    ]


@pytest.fixture(autouse=True)
def _quiet_logging(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """The same rule for what is logged inside the test process."""
    yield
    expected = [pattern for marker in request.node.iter_markers("expects_errors") for pattern in marker.args]
    for record in caplog.get_records("call"):
        if record.levelno >= logging.ERROR and record.name.startswith("stasis"):
            text = record.getMessage()
            assert any(re.search(pattern, text) for pattern in expected), f"an error was logged: {text}"


@pytest.fixture(autouse=True)
def _no_leaks(session_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the test when it leaves a process, a mount, a loop device or an open socket behind."""
    roots = [session_dir, tmp_path_factory.getbasetemp()]
    before = leaks.Leftovers.now(roots)
    yield
    left = leaks.leaked(before, roots)
    leaks.end_processes(leaks.session_processes() - before.processes)
    assert not left, "the test left behind:\n" + "\n".join(left)


def _system_module(name: str) -> ModuleType:
    # Only this module is taken from the distribution's directory: nothing else there may shadow the venv.
    spec = importlib.machinery.PathFinder.find_spec(name, [str(DIST_PACKAGES)])
    if spec is None or spec.loader is None:
        pytest.skip(f"needs {name} of python3-libnbd for Python {sys.version_info[0]}.{sys.version_info[1]}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def libnbd() -> ModuleType:
    """The `nbd` module of Debian's python3-libnbd; skipped where it was built for another Python."""
    _system_module("libnbdmod")
    return _system_module("nbd")
