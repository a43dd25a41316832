# SPDX-License-Identifier: Apache-2.0
"""The `stasis` command as tests call it: run it, read its JSON, expect its failures, end what it started."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from stasis.errors import ExitCode

__all__ = ["Stasis"]

Result = subprocess.CompletedProcess[str]


class Stasis:
    """`stasis` with a run directory and a state directory of its own."""

    def __init__(self, run_dir: Path, state_dir: Path) -> None:
        self.run_dir = run_dir
        self.state_dir = state_dir
        self.command = [sys.executable, "-m", "stasis"]
        self.environment = {
            **os.environ,
            "STASIS_RUN_DIR": str(run_dir),
            "STASIS_STATE_DIR": str(state_dir),
            "PYTHONWARNINGS": "default",
            "COLUMNS": "120",
        }

    def run(self, *arguments: str | Path, timeout: float = 120) -> Result:
        """Run a command whatever it returns."""
        return subprocess.run(
            [*self.command, *map(str, arguments)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def __call__(self, *arguments: str | Path, timeout: float = 120) -> str:
        """Run a command that must succeed; its standard output without the final newline."""
        result = self.run(*arguments, timeout=timeout)
        assert result.returncode == 0, f"stasis {arguments} returned {result.returncode}:\n{result.stderr}"
        return result.stdout.rstrip("\n")

    def json(self, *arguments: str | Path, timeout: float = 120) -> Any:
        """Run a command with --json that must succeed; the document it printed."""
        return json.loads(self(*arguments, "--json", timeout=timeout))

    def fail(self, exit_code: ExitCode, *arguments: str | Path, timeout: float = 120) -> str:
        """Run a command that must fail in exactly this way; its standard error, free of tracebacks."""
        result = self.run(*arguments, timeout=timeout)
        assert result.returncode == exit_code, (result.returncode, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        return result.stderr

    def popen(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command that goes on; the test ends it."""
        command = [*self.command, *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.environment, text=True, **{**pipes, **options})

    def daemon_pid(self) -> int | None:
        """Process number of the running daemon, from its lock file, which a running daemon holds locked."""
        try:
            with (self.run_dir / "daemon.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return int((self.run_dir / "daemon.lock").read_text())
        return None

    def stop(self) -> None:
        """End the daemon with all snapshots, devices and workers, those too that outlived a daemon that was killed."""
        if self.daemon_pid() is None and any((self.run_dir / "workers").glob("*.ctl")):
            self("device", "list")
        if self.daemon_pid() is not None:
            self("daemon", "stop", "--force")
