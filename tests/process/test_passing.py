# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of a dump and may be gone in a moment is waited for: the tree runs on, and stops again."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stasis.process.dump import job
from tests.process.programs import compiled, running, wait_for

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

LISTENER = r"""
#include <sys/socket.h>
#include <sys/un.h>
// A connection waits in a listening socket until the program is told to take it.
int main(void) {
    struct sockaddr_un name = {AF_UNIX};
    sprintf(name.sun_path + 1, "stasis-test-%d", getpid());
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(!bind(listener, (struct sockaddr *)&name, sizeof name) && !listen(listener, 4));
    CHECK(!connect(client, (struct sockaddr *)&name, sizeof name));
    touch("ready");
    await("take");
    int server = accept(listener, 0, 0);
    touch("taken");
    await("go");
    char data[5];
    CHECK(write(client, "hello", 5) == 5 && read(server, data, 5) == 5 && !memcmp(data, "hello", 5));
    return content();
}
"""


def test_a_connection_that_is_about_to_be_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        (tmp_path / "take").touch()
        wait_for((tmp_path / "taken").exists, "the program does not run on")

    with running(tmp_path, compiled(tmp_path, LISTENER)) as program:
        monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
        job.dump(program.pid, tmp_path / "images-0", job.DumpOptions(leave_running=True))
        assert pauses == [job.MOMENTS[0]]
        monkeypatch.undo()
        program.restore(program.dump())
        program.finish()
