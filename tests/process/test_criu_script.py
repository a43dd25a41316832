# SPDX-License-Identifier: Apache-2.0
"""Scripts written for criu get from stasis-criu what they expect."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.cli import criu, criu_switches
from stasis.errors import UnsupportedError
from stasis.process import features
from stasis.process.images.imageset import ImageSet
from tests.process.programs import PATIENCE

pytestmark = pytest.mark.root
COUNTING = """
import os, time
while True:
    os.truncate("count", os.stat("count").st_size + 1)
    time.sleep(0.005)
"""
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens meanwhile, nobody waits for the process for ever."""
    try:
        yield
    finally:
        process.kill()


def _run(*words: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from stasis.cli.criu import main; sys.exit(main())", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=directory,
                          stdin=subprocess.DEVNULL)  # fmt: skip


def _wait_for_more(path: Path) -> None:
    before, deadline = path.stat().st_size, time.monotonic() + PATIENCE
    while path.stat().st_size < before + 3:
        assert time.monotonic() < deadline, "the process does not go on"
        time.sleep(0.01)


def test_dump_and_restore_with_a_scripts_switches(tmp_path: Path) -> None:
    count, images = tmp_path / "count", tmp_path / "images"
    count.touch()
    images.mkdir()
    command = [sys.executable, "-c", COUNTING]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **QUIET) as process, ended(process):
        _wait_for_more(count)
        done = _run("dump", "-t", process.pid, "-D", images, "-o", "dump.log", "-v4", directory=tmp_path)
        assert done.returncode == 0, done.stderr
        assert process.wait() is not None
    done = _run("restore", "-D", images, "-d", "--pidfile", "pid", "-vvv", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    pid = int((images / "pid").read_text())
    assert pid == process.pid
    _wait_for_more(count)
    os.kill(pid, signal.SIGKILL)


def test_a_chain_of_dumps_with_a_scripts_switches(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.touch()
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\necho "$CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID" >> "$(dirname "$0")/actions"\n')
    script.chmod(0o755)
    for number in range(1, 5):
        (tmp_path / f"{number}").mkdir()
    command = [sys.executable, "-c", COUNTING]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **QUIET) as process, ended(process):
        _wait_for_more(count)
        _done("pre-dump", "-t", process.pid, "-D", "1", directory=tmp_path)
        _done("dump", "-t", process.pid, "-D", "2", "--prev-images-dir", "../1", "-R", "--track-mem",
              "--action-script", script, directory=tmp_path)  # fmt: skip
        _wait_for_more(count)
        _done("pre-dump", "-t", process.pid, "-D", "3", "--prev-images-dir", "../2", "--track-mem", directory=tmp_path)
        _done("dump", "--tree", process.pid, "-D", "4", "--prev-images-dir", "../3", "-v4", "-o", "log", "--shell-job",
              "--tcp-established", "--file-locks", "--ext-unix-sk", "--ghost-limit", "4M", "--network-lock", "skip",
              "--skip-in-flight", "--force-irmap", "--manage-cgroups=ignore", directory=tmp_path)  # fmt: skip
        process.wait()
    actions = ["pre-dump", "post-dump"]
    assert "Dumping finished successfully" in (tmp_path / "4" / "log").read_text()
    with ImageSet.open(tmp_path / "4") as images, contextlib.ExitStack() as cleanup:
        figures = images.one("stats-dump").dump
        assert min(figures.pages_skipped_parent, figures.pages_written) > 0
        chain = images.chain()
        for parent in chain[1:]:
            cleanup.callback(parent.close)
        assert [os.path.basename(os.path.realpath(each.path)) for each in chain] == ["4", "3", "2", "1"]
    _done("restore", "-D", "4", "-d", "--pidfile", "pid", "--action-script", script, "-j", "-l", directory=tmp_path)
    pid = int((tmp_path / "4" / "pid").read_text())
    actions += ["pre-restore", "post-restore", "pre-resume", "post-resume"]
    told = [f"{action} {'' if action == 'pre-restore' else pid}" for action in actions]
    assert (tmp_path / "actions").read_text().splitlines() == told
    with ImageSet.open(tmp_path / "4") as images:
        assert images.one("stats-restore").restore.restore_time > 0
    _wait_for_more(count)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("command", ["dump", "restore"])
def test_an_action_script_that_fails_undoes_everything(command: str, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.touch()
    script = tmp_path / "script"
    script.write_text('#!/bin/sh\ncase "$CRTOOLS_SCRIPT_ACTION" in post-*) exit 3;; esac\n')
    script.chmod(0o755)
    (tmp_path / "images").mkdir()
    started = [sys.executable, "-c", COUNTING]
    with subprocess.Popen(started, cwd=tmp_path, start_new_session=True, **QUIET) as process, ended(process):
        _wait_for_more(count)
        if command == "dump":
            done = _run("dump", "-t", process.pid, "-D", "images", "--action-script", script, directory=tmp_path)
            _wait_for_more(count)
            assert not list((tmp_path / "images").iterdir())
        else:
            _done("dump", "-t", process.pid, "-D", "images", directory=tmp_path)
            process.wait()
            done = _run("restore", "-D", "images", "-d", "--action-script", script, directory=tmp_path)
            assert not os.path.exists(f"/proc/{process.pid}")
    status = 3 if command == "dump" else 1  # criu hands on what the script behind a dump said
    assert (done.returncode, "ended with status 3 at post-" in done.stderr) == (status, True)


def test_the_script_behind_a_dump_finds_the_set(tmp_path: Path) -> None:
    """To send it on, say. In a container, too, and with the network of the command, not with the container's."""
    count, images, found = tmp_path / "count", tmp_path / "images", tmp_path / "found"
    count.touch()
    images.mkdir()
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\nls "$CRTOOLS_IMAGE_DIR" >> {found}\nreadlink /proc/self/ns/net >> {found}\n')
    script.chmod(0o755)
    command = ["unshare", "--net", sys.executable, "-c", COUNTING]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **QUIET) as process, ended(process):
        _wait_for_more(count)
        words = ("dump", "-t", process.pid, "-D", images, "-R", "--action-script", script)
        _done(*words, directory=tmp_path)
        told = found.read_text().splitlines()
        assert told[0] == os.readlink("/proc/self/ns/net") == told[-1]  # before, when nothing was there, and behind
        assert {"inventory.img", "pages-1.img", "stats-dump", f"core-{process.pid}.img"} <= set(told)
        script.write_text("#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = pre-dump ] || exit 5\n")
        (images / "inventory.img").unlink()
        assert _run(*map(str, words), "-D", "again", directory=tmp_path).returncode == 5
        assert not (tmp_path / "again").exists()
        _wait_for_more(count)


def _done(*words: str | Path | int, directory: Path) -> None:
    done = _run(*map(str, words), directory=directory)
    assert (done.returncode, done.stderr) == (0, "")  # no warning either: each set continues the one before


def test_failures_go_to_the_log_and_end_with_1(tmp_path: Path) -> None:
    done = _run("restore", "-D", tmp_path, "-o", "restore.log", directory=tmp_path)
    assert done.returncode == 1
    assert "holds no image set" in (tmp_path / "restore.log").read_text()


@pytest.mark.parametrize("switch", sorted(criu_switches.NOT_IMPLEMENTED))
def test_a_switch_that_is_not_implemented_is_named(switch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert criu.main(["dump", "-t", "1", switch]) == 1
    assert f"{switch.partition('=')[0]} is not implemented" in capsys.readouterr().err


@pytest.mark.parametrize("feature", sorted(features.PROBES))
def test_features_are_probed(feature: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = criu.main(["check", "--feature", feature])
    assert capsys.readouterr().out == f"{feature} is {'supported' if status == 0 else 'not supported'}\n"


@pytest.mark.parametrize("command", criu_switches.OTHER_COMMANDS)
def test_a_command_that_is_not_there_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert criu.main([command, "3"]) == 1
    assert f"{command} is not implemented" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("dump", "-t", "1"), ("pre-dump", "-t", "1"), ("restore",)])
def test_a_script_gives_its_switches_to_all_commands(command: tuple[str, ...]) -> None:
    """As with criu: those of a dump mean nothing to a restore, and the other way round."""
    parser = criu.build_parser()
    for switch, words in (criu_switches.OF_DUMPS | criu_switches.OF_RESTORES).items():
        known = {"--ghost-limit": "1M", "--network-lock": "skip", "--external": "mnt[]", "--inherit-fd": "fd[1]:x"}
        parser.parse_args([*command, switch, *([known.get(switch, "x")] if words == 1 else [])])
    assert criu.main(["restore", "--track-mem"]) == 1  # this one would mean something


def test_an_unknown_feature_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert criu.main(["check", "--feature", "time_travel"]) == 1
    assert "known:" in capsys.readouterr().err


def test_a_kernel_with_everything_looks_good(capsys: pytest.CaptureFixture[str]) -> None:
    missing = [name for name in features.REQUIRED if not features.has(name)]
    assert criu.main(["check"]) == (1 if missing else 0)
    assert capsys.readouterr().out == (f"Missing: {', '.join(missing)}\n" if missing else "Looks good.\n")


@pytest.mark.parametrize(("text", "way"), [("mnt[/data]:key", "--map-path"), ("net[4026531840]:key", "namespace")])
def test_what_is_left_outside_in_another_way_is_named_with_it(text: str, way: str) -> None:
    assert criu_switches.outside("mnt[]") == "mnt[]"
    with pytest.raises(UnsupportedError, match=re.escape(text)) as raised:
        criu_switches.outside(text)
    assert way in raised.value.hint
