# SPDX-License-Identifier: Apache-2.0
"""Every command in every state has dattobd's errno, checked in its order; what may not be changes nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from stasis.datto.registry import Registry, Target, TracerRecord
from stasis.datto.states import MOVES, Move, State, move
from stasis.datto.status import status
from stasis.errors import NotFoundError, StasisError, StorageError, UsageError

KEY = ("block", 7, 0)


class FakeBackend:
    """Devices sda (served), sdb (served), sdc (not served); `file` is no device. Workers do as they are told."""

    def __init__(self) -> None:
        self.maximum, self.saved = 3, 0
        self.asked: list[tuple[str, str]] = []
        self.open = 0
        self.error: StasisError | None = None
        self.minors: dict[str, int] = {}

    def limit(self) -> int:
        return self.maximum

    def find(self, path: str) -> Target:
        if path == "file":
            raise UsageError("no device", errno=errno.ENOTBLK)
        if path not in ("sda", "sdb", "sdc"):
            raise NotFoundError("not there")
        return Target(path, ("block", ord(path[2]), 0), None if path == "sdc" else path)

    def ask(self, device: str, request: str, **fields: Any) -> dict[str, Any]:
        self.asked.append((device, request))
        if self.error is not None and request not in ("info", "abort", "drop"):
            raise self.error
        return {"minor": self.minors.get(device, 0), "open": self.open, "uuid": "00" * 16, "seqid": 1, "version": 1}

    def prepare(self, device: str, minor: int, cow: str, size: int, cache: int) -> None:
        self.minors[device] = minor
        self.ask(device, "prepare")

    def changed(self) -> None:
        self.saved += 1


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def registry(backend: FakeBackend) -> Registry:
    return Registry(backend)


def _code(call: Callable[[], object]) -> int:
    try:
        call()
    except StasisError as error:
        return error.errno
    return 0


def _add(registry: Registry, state: State, error: int = 0) -> TracerRecord:
    device = "sda" if state.is_active else None
    record = registry.tracers[0] = TracerRecord(0, "sda", "/cow", state, ("block", ord("a"), 0), device, error)
    return record


COMMANDS: dict[str, Callable[[Registry], object]] = {
    "destroy": lambda registry: registry.destroy(0),
    "transition-to-incremental": lambda registry: registry.transition_incremental(0),
    "transition-to-snapshot": lambda registry: registry.transition_snapshot(0, "/cow2"),
    "reconfigure": lambda registry: registry.reconfigure(0, 400),
    "info": lambda registry: registry.find(0),
    "expand-cow-file": lambda registry: registry.expand_cow_file(0, 1),
    "reconfigure-auto-expand": lambda registry: registry.reconfigure_auto_expand(0, 1, 1),
}
ALLOWED = {
    "destroy": set(State),
    "transition-to-incremental": {State.ACTIVE_SNAPSHOT},
    "transition-to-snapshot": {State.ACTIVE_INCREMENTAL},
    "reconfigure": set(State),
    "info": set(State),
    "expand-cow-file": {State.ACTIVE_SNAPSHOT},
    "reconfigure-auto-expand": {State.ACTIVE_SNAPSHOT},
}
BUSY = {"destroy", "transition-to-incremental", "transition-to-snapshot", "reconfigure"}
WORK_AFTER_FAILURE = {"destroy", "info"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", State)
def test_every_command_in_every_state(registry: Registry, backend: FakeBackend, state: State, command: str) -> None:
    before = _add(registry, state).as_dict()
    allowed = state in ALLOWED[command]
    assert _code(lambda: COMMANDS[command](registry)) == (0 if allowed else errno.EINVAL)
    if not allowed:
        assert registry.tracers[0].as_dict() | {"uuid": "", "seqid": 0, "version": 0} == before
        assert backend.saved == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", State)
def test_after_a_failure_only_destroy_and_info_work(registry: Registry, state: State, command: str) -> None:
    _add(registry, state, -errno.EFBIG)
    expected = 0 if command in WORK_AFTER_FAILURE else errno.EINVAL
    assert _code(lambda: COMMANDS[command](registry)) == expected


@pytest.mark.parametrize("error", [0, -errno.EIO])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_open_image_is_busy_before_anything_else_is_looked_at(registry: Registry, backend: FakeBackend,
                                                                 command: str, error: int) -> None:
    _add(registry, State.ACTIVE_SNAPSHOT, error)
    backend.open = 1
    if command in BUSY:
        assert _code(lambda: COMMANDS[command](registry)) == errno.EBUSY
        assert 0 in registry.tracers
    else:
        assert _code(lambda: COMMANDS[command](registry)) == (errno.EINVAL if error and command != "info" else 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_minors_that_cannot_be_and_that_are_free(registry: Registry, backend: FakeBackend, command: str) -> None:
    assert _code(lambda: COMMANDS[command](registry)) == errno.ENOENT
    backend.maximum = 0
    assert _code(lambda: COMMANDS[command](registry)) == errno.EINVAL


@pytest.mark.parametrize(("minor", "bdev", "cow", "number"), [
    (3, "none", "/c", errno.EINVAL),
    (-1, "sda", "/c", errno.EINVAL),
    (0, "none", "/c", errno.EBUSY),
    (1, "none", "/c", errno.ENOENT),
    (1, "file", "/c", errno.ENOTBLK),
    (1, "sdc", "/c", errno.EINVAL),
    (1, "sda", "/c", errno.EINVAL),
    (1, "sdb", "", errno.EINVAL),
    (1, "", "/c", errno.EINVAL),
    (1, "sdb", "/" + "c" * 4095, errno.EINVAL),
    (1, "sdb", "/c", 0),
])
def test_setup_checks_in_dattobd_s_order(registry: Registry, backend: FakeBackend, minor: int, bdev: str, cow: str,
                                         number: int) -> None:
    _add(registry, State.ACTIVE_SNAPSHOT)
    assert _code(lambda: registry.setup_snapshot(minor, bdev, cow)) == number
    assert (("sdb", "begin") in backend.asked) is (number == 0)
    assert (1 in registry.tracers) is (number == 0)


def test_an_unverified_tracer_does_not_keep_its_device_from_being_set_up(registry: Registry) -> None:
    _add(registry, State.UNVERIFIED_SNAPSHOT)
    assert registry.setup_snapshot(1, "sda", "/c").state is State.ACTIVE_SNAPSHOT


@pytest.mark.parametrize(("minor", "bdev", "number"), [
    (3, "none", errno.EINVAL), (0, "none", errno.EBUSY), (1, "none", errno.ENOENT), (1, "file", errno.ENOTBLK),
    (1, "sda", errno.EINVAL), (1, "sdc", 0),
])
@pytest.mark.parametrize("kind", ["snapshot", "incremental"])
def test_reload_checks_in_dattobd_s_order(registry: Registry, backend: FakeBackend, minor: int, bdev: str,
                                          number: int, kind: str) -> None:
    _add(registry, State.DORMANT_SNAPSHOT)
    reload = registry.reload_snapshot if kind == "snapshot" else registry.reload_incremental
    assert _code(lambda: reload(minor, bdev, "/never looked at")) == number
    if not number:
        assert registry.tracers[1].state is (
            State.UNVERIFIED_SNAPSHOT if kind == "snapshot" else State.UNVERIFIED_INCREMENTAL)
    assert backend.asked == []


@pytest.mark.parametrize("mib", [-1, 1 << 43, 1 << 64])
def test_sizes_that_no_file_can_have(registry: Registry, mib: int) -> None:
    assert _code(lambda: registry.setup_snapshot(0, "sda", "/c", mib)) == errno.EFBIG
    _add(registry, State.ACTIVE_INCREMENTAL)
    assert _code(lambda: registry.transition_snapshot(0, "/c", mib)) == errno.EFBIG


def test_a_worker_that_refuses_leaves_no_tracer(registry: Registry, backend: FakeBackend) -> None:
    backend.error = StorageError("full")
    assert _code(lambda: registry.setup_snapshot(0, "sda", "/c")) == errno.ENOSPC
    assert registry.tracers == {}


def test_a_group_is_set_up_as_a_whole_or_not_at_all(registry: Registry, backend: FakeBackend) -> None:
    def begin(names: list[str]) -> dict[str, dict[str, Any]]:
        return {name: backend.ask(name, "begin") for name in names}

    assert _code(lambda: registry.setup_group([(0, "sda", "/a"), (1, "sda", "/b")], begin=begin)) == errno.EINVAL
    assert ("sda", "drop") in backend.asked
    assert _code(lambda: registry.setup_group([(0, "sda", "/a"), (0, "sdb", "/b")], begin=begin)) == errno.EBUSY
    assert registry.tracers == {}
    registry.setup_group([(0, "sda", "/a"), (1, "sdb", "/b")], begin=begin)
    assert [record.bdev for record in registry.tracers.values()] == ["sda", "sdb"]


def test_free_minors_are_given_from_below(registry: Registry) -> None:
    assert registry.get_free_minor() == 0
    registry.setup_snapshot(0, "sda", "/c")
    assert registry.get_free_minor() == 1
    registry.setup_snapshot(2, "sdb", "/c")
    assert registry.get_free_minor() == 1
    registry.reload_snapshot(1, "sdc", "/c")
    assert _code(registry.get_free_minor) == errno.ENOENT


def test_a_file_size_goes_from_snapshot_to_snapshot(registry: Registry, backend: FakeBackend) -> None:
    registry.setup_snapshot(0, "sda", "/c", fallocated=7)
    registry.transition_incremental(0)
    assert registry.transition_snapshot(0, "/d").fallocated == 7
    registry.transition_incremental(0)
    assert registry.transition_snapshot(0, "/e", 9).fallocated == 9


# -- the life of devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", Move)
@pytest.mark.parametrize("state", State)
def test_moves_are_those_of_the_table(state: State, what: Move) -> None:
    wanted = MOVES.get((state, what))
    assert _code(lambda: move(state, what)) == (errno.EINVAL if wanted is None else 0)
    if wanted is not None and what in (Move.SLEEP, Move.WAKE, Move.FORGET):
        assert wanted.is_snapshot is state.is_snapshot


@pytest.mark.parametrize("state", [State.DORMANT_SNAPSHOT, State.UNVERIFIED_INCREMENTAL])
def test_a_device_that_is_served_again_wakes_its_tracer(registry: Registry, state: State) -> None:
    record = _add(registry, state)
    assert registry.of_device("sda", "/dev/sda", record.key) is record
    registry.woke(record, {"minor": 0, "error": 0})
    assert (record.state, record.bdev) == (State(2 + state.is_snapshot), "/dev/sda")
    registry.slept("sda")
    assert record.state is State(int(state.is_snapshot))


def test_a_worker_that_did_not_answer_is_asked_again(registry: Registry) -> None:
    record = _add(registry, State.UNVERIFIED_SNAPSHOT)
    assert registry.unseen() == []  # its device is not served
    registry.of_device("sda", "/dev/sda", record.key)
    assert registry.unseen() == [record]
    registry.woke(record, {"minor": 0, "error": 0})
    assert registry.unseen() == []
    registry.rested(record)
    assert registry.unseen() == []
    registry.slept("sda")
    assert registry.unseen() == [record]  # attached again it may be as slow
    registry.woke(record, {"minor": 0, "error": -22, "reason": "unclean"})
    assert registry.unseen() == []


def test_a_file_that_cannot_be_taken_up_leaves_the_state_and_says_why(registry: Registry) -> None:
    record = _add(registry, State.UNVERIFIED_SNAPSHOT)
    registry.of_device("sda", "sda", record.key)
    registry.woke(record, {"minor": 0, "error": -22, "reason": "unclean"})
    assert (record.state, record.error, record.reason) == (State.UNVERIFIED_SNAPSHOT, -22, "unclean")
    assert registry.of_device("sda", "sda", record.key) is None


def test_one_that_rests_is_retired_and_not_dropped(registry: Registry, backend: FakeBackend) -> None:
    record = _add(registry, State.ACTIVE_INCREMENTAL)
    registry.rested(record)
    assert (record.state, record.resting) == (State.DORMANT_INCREMENTAL, True)
    for command in ("transition-to-snapshot", "expand-cow-file"):
        assert _code(lambda command=command: COMMANDS[command](registry)) == errno.EINVAL
    registry.woke(record, {"minor": 0, "error": 0})
    assert (record.state, record.resting) == (State.ACTIVE_INCREMENTAL, False)
    registry.rested(record)
    registry.destroy(0)
    assert backend.asked[-1] == ("sda", "retire")


@pytest.mark.parametrize(("minor", "asked"), [(0, [("sda", "info"), ("sda", "drop")]), (1, [("sda", "info")])])
def test_one_that_failed_unseen_is_dropped_where_it_still_is(registry: Registry, backend: FakeBackend, minor: int,
                                                             asked: list[tuple[str, str]]) -> None:
    """The daemon was killed after the failure; a new series would be refused if the worker kept the old one."""
    record = _add(registry, State.UNVERIFIED_SNAPSHOT, error=-errno.ESTALE)
    record.device, backend.minors["sda"] = "sda", minor
    registry.destroy(0)
    assert (backend.asked, registry.tracers) == (asked, {})


def test_one_that_rests_is_no_more_than_dormant_when_its_device_goes(registry: Registry, backend: FakeBackend) -> None:
    record = _add(registry, State.ACTIVE_SNAPSHOT)
    registry.rested(record)
    registry.slept("sda")
    assert (record.state, record.resting) == (State.DORMANT_SNAPSHOT, False)
    registry.destroy(0)
    assert backend.asked == []


@pytest.mark.parametrize(("minor", "bdev", "number"), [
    (3, "none", errno.EINVAL), (0, "none", errno.EBUSY), (1, "none", errno.ENOENT), (1, "file", errno.ENOTBLK),
    (1, "sda", errno.EINVAL), (1, "sdb", errno.EINVAL), (1, "sdc", 0),
])
def test_a_live_device_is_checked_as_in_setup(registry: Registry, minor: int, bdev: str, number: int) -> None:
    _add(registry, State.ACTIVE_SNAPSHOT)
    assert _code(lambda: registry.enter(registry.new_live(minor, bdev, "/c"))) == number
    assert (1 in registry.tracers) is (number == 0)


def test_a_device_that_is_served_does_not_take_a_live_tracer_over(registry: Registry) -> None:
    record = registry.new_live(0, "sdc", "/c")
    record.mark = ("a generation", 3)
    registry.enter(record)
    assert _code(lambda: registry.new_live(1, "sdc", "/d")) == errno.EINVAL
    assert registry.of_device("sdc", "/dev/sdc", record.key) is None
    assert TracerRecord.from_dict(record.as_dict()) == record


# -- the status file ----------------------------------------------------------------------------------------


def test_status_has_the_module_s_keys_in_their_order(registry: Registry) -> None:
    registry.setup_snapshot(1, "sdb", "/c", fallocated=3, cache=0)
    _add(registry, State.UNVERIFIED_SNAPSHOT, -22)
    registry.tracers[1].auto_expand, registry.tracers[1].cow_size = (5, 6), 100
    found = status(registry.tracers.values())
    assert [list(device) for device in found["devices"]] == [
        ["minor", "cow_file", "block_device", "max_cache", "error", "state"],
        ["minor", "cow_file", "block_device", "max_cache", "fallocate", "cow_size_current", "seq_id", "uuid",
         "version", "nr_changed_blocks", "auto_expand", "state"],
    ]
    assert found["devices"][1]["fallocate"] == 3 << 20
    assert found["devices"][1]["max_cache"] == 314572800
    assert (found["devices"][0]["error"], found["devices"][0]["state"]) == (-22, 5)
    registry.tracers[1].version = 0
    assert "nr_changed_blocks" not in status(registry.tracers.values())["devices"][1]


def test_a_record_survives_being_stored(registry: Registry) -> None:
    record = registry.setup_snapshot(1, "sdb", "/c", fallocated=3)
    record.auto_expand = (5, 6)
    assert TracerRecord.from_dict(record.as_dict()) == record
