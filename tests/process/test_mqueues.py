# SPDX-License-Identifier: Apache-2.0
"""POSIX message queues: descriptors of those that live on, and all of an IPC namespace with what waits in them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import DamagedError, ExitCode
from stasis.linux import mqueue
from stasis.process.namespaces.mqueues import _contents, _messages
from tests.process.containers import container
from tests.process.programs import compiled, running, stasis

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc"), pytest.mark.tool("unshare")]

NAME = f"stasis-test-{os.getpid()}"  # tests that run beside these in other processes share the namespace
QUEUES = r"""
#include <mqueue.h>
static void expect(mqd_t queue, const char *text, unsigned priority) {
    char data[100];
    unsigned found;
    CHECK(mq_receive(queue, data, sizeof data, &found) == (ssize_t)strlen(text));
    CHECK(!memcmp(data, text, strlen(text)) && found == priority);
}
int main(int argc, char **argv) {
    umask(077);
    struct mq_attr attributes = {.mq_maxmsg = 7, .mq_msgsize = 100}, now;
    mqd_t queue = mq_open("/stasis-test", O_RDWR | O_CREAT | O_EXCL, 0600, &attributes);
    CHECK(queue >= 0 && !fchmod(queue, 0646) && !fchown(queue, 7, 8));
    mqd_t sender = mq_open("/stasis-test", O_WRONLY | O_NONBLOCK), same = dup(queue);
    CHECK(!mq_send(sender, "low", 3, 1) && !mq_send(sender, "high", 4, 9) && !mq_send(sender, "", 0, 1));
    CHECK(!mq_send(sender, "last", 4, 1));
    if (argc > 1 && *argv[1] == 'n') {
        struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
        CHECK(!mq_notify(queue, &event));
    }
    if (argc > 1 && *argv[1] == 'u') CHECK(!mq_unlink("/stasis-test"));
    set_up();
    CHECK(!mq_getattr(queue, &now) && now.mq_maxmsg == 7 && now.mq_msgsize == 100 && now.mq_curmsgs == 4);
    CHECK(!now.mq_flags && !mq_getattr(sender, &now) && now.mq_flags == O_NONBLOCK);
    CHECK(fcntl(queue, F_GETFD) == FD_CLOEXEC && !fcntl(same, F_GETFD));
    struct stat status;
    CHECK(!fstat(queue, &status) && (status.st_mode & 0777) == 0646 && status.st_uid == 7 && status.st_gid == 8);
    CHECK(mq_receive(sender, (char[100]){}, 100, 0) < 0 && errno == EBADF);
    expect(queue, "high", 9);
    expect(same, "low", 1);
    expect(queue, "", 1);
    expect(queue, "last", 1);
    struct mq_attr nonblocking = {.mq_flags = O_NONBLOCK};
    CHECK(!mq_setattr(same, &nonblocking, 0) && mq_receive(queue, (char[100]){}, 100, 0) < 0 && errno == EAGAIN);
    return content();
}
""".replace("/stasis-test", f"/{NAME}")


@pytest.fixture(autouse=True)
def _no_queue() -> Iterator[None]:
    try:
        mqueue.names()
    except OSError:
        pytest.skip("needs a kernel with POSIX message queues")
    yield
    for name in mqueue.names():
        if name == NAME:
            mqueue.unlink(name)


def test_a_queue_that_lives_on_is_opened_again(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, QUEUES, "-lrt")) as program:
        program.again_and_again()
        program.finish()


def test_a_queue_that_is_gone_is_named(tmp_path: Path) -> None:
    with running(tmp_path, compiled(tmp_path, QUEUES, "-lrt")) as program:
        images = program.dump()
        mqueue.unlink(NAME)
        said = stasis("restore", "--images", images, status=ExitCode.STATE)
        assert f"/{NAME}" in said


@pytest.mark.parametrize(("word", "reason"), [("notify", "mq_notify"), ("unlinked", "was unlinked")])
def test_what_cannot_be_kept_is_named(tmp_path: Path, word: str, reason: str) -> None:
    with running(tmp_path, compiled(tmp_path, QUEUES, "-lrt"), word) as program:
        said = stasis("dump", program.pid, "--images", tmp_path / "images", status=ExitCode.UNSUPPORTED)
        assert reason in said


def test_a_namespace_comes_back_with_its_messages(tmp_path: Path) -> None:
    with container(tmp_path, "--ipc", compiled(tmp_path, QUEUES, "-lrt")) as program:
        program.again_and_again()
        program.finish()


def test_who_asked_is_killed_and_no_message_is_lost() -> None:
    wanted = [(3, b"one"), (3, b""), (1, b"last")]
    fd = mqueue.make(NAME, 0o600, mqueue.Attributes(5, 100, 0))
    try:
        for message in wanted:
            mqueue.send(fd, *message)
        for step in range(15):
            reader, writer = os.pipe()
            if (pid := os.fork()) == 0:
                while True:
                    _contents(fd)
            time.sleep(0.001 * step)  # any moment will do
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(writer)
            assert not os.read(reader, 1)  # the helper, which has the other end, has ended
            os.close(reader)
        assert list(_messages(_contents(fd), "an image")) == wanted
    finally:
        os.close(fd)


@pytest.mark.parametrize("contents", [b"\1\0\0\0\4\0\0\0abc", b"\1\0\0", b"\0\0\1\0\0\0\0\0"])
def test_messages_that_are_not_whole(contents: bytes) -> None:
    with pytest.raises(DamagedError, match="not whole"):
        list(_messages(contents, "an image"))
