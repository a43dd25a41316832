# SPDX-License-Identifier: Apache-2.0
"""Action scripts of `stasis-criu`: run as criu runs them, told by their environment what is being done.

They see what the command sees. A container is dumped and restored by a process that has gone into its namespaces: that
one has another process, which stayed behind, run the scripts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from typing import Any, NoReturn, Self

from stasis.errors import StasisError

__all__ = ["ScriptError", "Scripts"]

LENGTH = 4096


class ScriptError(StasisError):
    """A script that did not end with 0."""


class Scripts:
    """The scripts of a command; a context manager. `status`: that of the script behind a dump that wants it undone,
    which criu hands on."""

    def __init__(self, scripts: Sequence[str], images: str) -> None:
        self.status = 0
        self._scripts, self._images = scripts, os.path.abspath(images)
        self._forked = False
        self._runner = 0

    def __enter__(self) -> Self:
        if self._scripts:
            self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._runner = os.fork()
            if not self._runner:
                self._ours.close()
                self._serve(theirs)
            theirs.close()
            os.register_at_fork(after_in_child=self._note_fork)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._runner:
            self._ours.shutdown(socket.SHUT_RDWR)  # whoever else was forked with it may have it open
            self._ours.close()
            ended = os.waitstatus_to_exitcode(os.waitpid(self._runner, 0)[1])
            self.status = self.status or max(ended, 0)

    def _note_fork(self) -> None:
        self._forked = True

    def run(self, action: str, pid: int) -> str:
        """Run them all for an action; `pid` is that of the first process, or 0. Returns what is to be noted of one that
        failed when it was too late. ScriptError for one that failed before."""
        for script in self._scripts:
            status = self._elsewhere(script, action, pid) if self._forked else self._run(script, action, pid)
            if status and action == "post-resume":
                return f"{script} ended with status {status} at {action}"
            if status:
                self.status = status if action == "post-dump" else 0
                raise ScriptError(f"{script} ended with status {status} at {action}", hint="see what it printed")
        return ""

    def _run(self, script: str, action: str, pid: int) -> int:
        told = {"CRTOOLS_SCRIPT_ACTION": action, "CRTOOLS_IMAGE_DIR": self._images}
        if pid:
            told["CRTOOLS_INIT_PID"] = str(pid)
        return subprocess.run([script], env={**os.environ, **told}, stdin=subprocess.DEVNULL).returncode

    def _elsewhere(self, script: str, action: str, pid: int) -> int:
        self._ours.send(json.dumps([script, action, pid]).encode())
        answer = self._ours.recv(LENGTH)
        if not answer:
            raise ScriptError(f"{script} could not be run at {action}", hint="nobody is left who runs it")
        found = json.loads(answer)
        if isinstance(found, str):
            raise ScriptError(f"{script} could not be run at {action}: {found}", hint="see whether it may be executed")
        return int(found)

    def _serve(self, asked: socket.socket) -> NoReturn:
        """Until nobody asks any more. Ends with the status that is handed on."""
        wanted = 0
        try:
            while request := asked.recv(LENGTH):
                script, action, pid = json.loads(request)
                try:
                    answer: int | str = self._run(script, action, pid)
                except OSError as error:
                    answer = str(error)
                if isinstance(answer, int) and action == "post-dump":
                    wanted = answer
                asked.send(json.dumps(answer).encode())
        finally:  # never back into the command
            os._exit(wanted)
