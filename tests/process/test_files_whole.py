# SPDX-License-Identifier: Apache-2.0
"""A program with open files of many kinds through a whole dump and restore, by the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process.programs import cycle

pytestmark = [pytest.mark.root, pytest.mark.tool("gcc")]

MANY = r"""
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
int main(void) {
    char text[16] = "";
    int deleted = open("deleted", O_CREAT | O_RDWR, 0600);
    CHECK(ftruncate(deleted, 8192) == 0 && pwrite(deleted, "ghost", 5, 4096) == 5);
    char *shared = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, deleted, 0);
    CHECK(shared != MAP_FAILED && unlink("deleted") == 0);
    int event = eventfd(5, 0), watch = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, 0), pair[2];
    struct epoll_event wanted = {EPOLLIN, {.u64 = 77}}, seen = {0};
    CHECK(epoll_ctl(watch, EPOLL_CTL_ADD, event, &wanted) == 0);
    struct itimerspec later = {.it_value.tv_sec = 1000};
    CHECK(timerfd_settime(timer, 0, &later, 0) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && write(pair[0], "queued", 6) == 6);
    set_up();
    CHECK(memcmp(shared + 4096, "ghost", 5) == 0);
    shared[4096] = 'G';
    CHECK(pread(deleted, text, 5, 4096) == 5 && memcmp(text, "Ghost", 5) == 0);
    CHECK(epoll_wait(watch, &seen, 1, 0) == 1 && seen.data.u64 == 77);
    uint64_t count = 0;
    CHECK(read(event, &count, 8) == 8 && count == 5);
    CHECK(timerfd_gettime(timer, &later) == 0 && later.it_value.tv_sec > 900);
    CHECK(read(pair[1], text, 16) == 6 && memcmp(text, "queued", 6) == 0);
    return content();
}
"""


def test_many_kinds_of_files_come_back(tmp_path: Path) -> None:
    cycle(tmp_path, MANY, times=2)
