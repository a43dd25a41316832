# SPDX-License-Identifier: Apache-2.0
"""Every command, option and error text of blksnap's console tool, as a script sees them.

`$ ` begins a command, what follows is its standard output, `! ` its standard error, which means exit code 1.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.blksnap.console.commands import COMMANDS, REPLACED
from stasis.cli.blksnap.main import main
from tests.blksnap.console.conftest import Tool

MIB = 1 << 20

Names = dict[str, str]


@pytest.fixture
def names(short_dir: Path) -> Names:
    """Two images, a directory for storage, an output file, and paths that are no devices."""
    for name in ("one", "two"):
        with (short_dir / f"{name}.img").open("wb") as file:
            file.truncate(4 * MIB)
    (short_dir / "diff").mkdir()
    (short_dir / "diff" / "one.img").write_bytes(bytes(MIB))
    (short_dir / "large").write_bytes(bytes(2 * MIB))
    return {"ONE": f"{short_dir}/one.img", "TWO": f"{short_dir}/two.img", "DIFF": f"{short_dir}/diff",
            "OUT": f"{short_dir}/out", "NOTHING": f"{short_dir}/nothing", "LARGE": f"{short_dir}/large",
            "RUN": f"{short_dir}/run", "NOBODY": "11111111-2222-3333-4444-555555555555"}  # fmt: skip


def test_words_that_are_no_commands(blksnap: Tool) -> None:
    assert blksnap().err == "Command not found.\n"
    blksnap.replay(
        """
$ bogus
! Command is not set.
$ --bogus
! Command is not set.
$ snapshot
! Command is not set.
$ stretch_snapshot -i x -p /tmp -l 100
! Command 'stretch_snapshot' is no more: give 'snapshot_create' the options --file and --limit, and watch with \
'snapshot_watcher'.
$ snapshot_appendstorage -i x -f y
! Command 'snapshot_appendstorage' is no more: give 'snapshot_create' the options --file and --limit: the storage \
grows by itself.
$ setlog -l 7
! Command 'setlog' is no more: the log is daemon.log in the directory of 'stasis daemon'.
$ mod
! Command 'mod' is no more: print the version with 'version'.
""",
        {},
    )


def test_help(blksnap: Tool) -> None:
    whole = blksnap.ok("help")
    assert whole == blksnap.ok("--help") == blksnap.ok("-h")
    for name in COMMANDS:
        own = blksnap.ok(name, "--help")
        assert own in whole
        assert own == blksnap.ok(name, "-h") == blksnap.ok(name, "--he")


def test_options_that_cannot_be_read(blksnap: Tool) -> None:
    blksnap.replay(
        """
$ attach --device
! the required argument for option '--device' is missing
$ attach -d
! the required argument for option '--device' is missing
$ attach --bogus
! unrecognised option '--bogus'
$ attach -z
! unrecognised option '-z'
$ attach -d a -d b
! option '--device' cannot be specified more than once
$ version --json=1
! option '--json' does not take any arguments
$ version -j -j
! option '--json' cannot be specified more than once
$ attach --device=
! the argument for option '--device' should follow immediately after the equal sign
""",
        {},
    )


@pytest.mark.parametrize("command", ["attach", "detach", "cbtinfo", "readcbtmap", "markdirtyblock", "snapshot_add",
                                     "snapshot_info"])  # fmt: skip
def test_commands_that_need_a_device(blksnap: Tool, names: Names, command: str) -> None:
    """Nothing but the device is looked at, so no daemon is started for it."""
    rest = {"markdirtyblock": "-r 0:1", "snapshot_add": "-i $NOBODY"}.get(command, "")
    blksnap.replay(
        f"""
$ {command} {rest}
! Argument 'device' is missed.
$ {command} {rest} -d $NOTHING
! Failed to open block device [$NOTHING]: No such file or directory
$ {command} {rest} -d /dev/null
! Failed to open block device [/dev/null]: Invalid argument
""",
        names,
    )
    assert blksnap.stasis.daemon_pid() is None


def test_a_control_node_that_is_not_there(
    blksnap: Tool, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is missed before arguments are, where the tool looks for it first."""
    monkeypatch.setenv("STASIS_RUN_DIR", "/proc/none")
    for command in ("version", "snapshot_create", "snapshot_destroy", "snapshot_take", "snapshot_waitevent",
                    "snapshot_watcher", "snapshot_collect", f"attach -d {names['ONE']}"):  # fmt: skip
        blksnap.replay(f"$ {command}\n! /proc/none/control.sock: No such file or directory\n", names)


def test_version_attach_and_detach(blksnap: Tool, names: Names) -> None:
    blksnap.replay(
        """
$ version
2.0.0.0
$ version extra words
2.0.0.0
$ version --json
{"version": "2.0.0.0", "stasis": "0.1.0"}
$ attach -d $ONE
Attached successfully
$ attach --dev=$ONE
Already was attached
$ attach -d$ONE --json
{"device": "$ONE", "name": "one.img", "node": <node>, "uri": "<image>", "already_attached": true}
$ attach --device $TWO -j
{"device": "$TWO", "name": "two.img", "node": <node>, "uri": "<image>", "already_attached": false}
$ detach -d $ONE
$ detach -d $ONE
! Failed to detach filter from the block device: No such file or directory
$ tracker_remove -d $TWO -j
{"device": "$TWO", "name": "two.img"}
$ attach -d $ONE
Attached successfully
$ attach -d $DIFF/one.img -j
{"device": "$DIFF/one.img", "name": "one.img-2", "node": <node>, "uri": "<image>", "already_attached": false}
""",
        names,
    )


def test_change_tracking(blksnap: Tool, names: Names) -> None:
    found = blksnap.replay(
        """
$ cbtinfo -d $ONE
! No such file or directory
$ readcbtmap -d $ONE -f $OUT
! No such file or directory
$ attach -d $ONE
Attached successfully
$ cbtinfo --device $ONE
block_size=65536
device_capacity=4194304
block_count=64
generation_id=<uuid:GENERATION>
changes_number=0
$ cbtinfo -d $ONE -j
{"block_size": 65536, "device_capacity": 4194304, "block_count": 64, "generation_id": "$GENERATION", \
"changes_number": 0}
$ readcbtmap -d $ONE
! Argument 'file' is missed.
$ readcbtmap -d $ONE -f /proc/none/map
! No such file or directory
$ readcbtmap -d $ONE -f $OUT
$ tracker_readcbtmap -d $ONE -f $OUT -j
{"file": "$OUT", "block_count": 64}
$ tracker_collect
count=1
,
device=<n>:<n>
blk_size=65536
device_capacity=4194304
blk_count=64
generationId=$GENERATION
snap_number=0
.
""",
        names,
    )
    assert Path(found["OUT"]).read_bytes() == bytes(64)


def test_marking_blocks(blksnap: Tool, names: Names) -> None:
    """In the snapshot that is held and in the next one; all ranges or none."""
    found = blksnap.replay(
        """
$ markdirtyblock -d $ONE
! Argument 'ranges' is missed.
$ markdirtyblock -d $ONE -r
! the required argument for option '--ranges' is missing
$ markdirtyblock -d $ONE -r 08
! Invalid format of range string.
$ markdirtyblock -d $ONE -r 0:x
! stoull
$ markdirtyblock -d $ONE -r 0:8
! No such file or directory
$ snapshot_create -d $ONE -f $DIFF -l 1M
<uuid:ID>
$ snapshot_take -i $ID
$ markdirtyblock -d $ONE --ranges 0:1 127:2 --range 1024:128 -r 8191:1 extra
! Invalid format of range string.
$ markdirtyblock -d $ONE --ranges 0:1 127:2 --range 1024:128 -r 8191:1
$ markdirtyblock -d $ONE -r 512:1 8191:2
! Invalid argument
$ markdirtyblock -d $ONE -r 512:0
! Invalid argument
$ markdirtyblock -d $ONE -r -1:1
! Invalid argument
$ tracker_markdirtyblock -d $ONE -r 640:1 -j
{"device": "$ONE", "ranges": [{"sector": 640, "count": 1}]}
$ markdirtyblock -f $NOTHING -d $ONE
! Failed to get file size.: No such file or directory
$ markdirtyblock -f /proc/version
! Failed to call FS_IOC_FIEMAP.: Operation not supported
$ readcbtmap -d $ONE -f $OUT
$ snapshot_destroy -i $ID
""",
        names,
    )
    marked = {0, 1, 5, 8, 63}
    assert Path(found["OUT"]).read_bytes() == bytes(int(block in marked) for block in range(64))
    blksnap.replay("$ snapshot_create -d $ONE -f $DIFF -l 1M\n<uuid:NEXT>\n$ snapshot_take -i $NEXT\n", found)
    blksnap.ok("readcbtmap", "-d", names["ONE"], "-f", names["OUT"])
    assert Path(names["OUT"]).read_bytes() == bytes(2 * int(block in marked) for block in range(64))


def test_a_snapshot_from_its_creation_to_its_end(blksnap: Tool, names: Names) -> None:
    blksnap.replay(
        """
$ snapshot_collect

$ snapshot_create --device $ONE $TWO --file $DIFF --limit 1M
<uuid:ID>
$ snapshot_collect
$ID \n
$ snapshot_collect -j
{"snapshots": ["$ID"]}
$ snapshot_add -d $ONE -i $ID
! Operation already in progress
$ snapshot_info -d $ONE
error_code=0
image=
$ snapshot_take --id $ID
$ snapshot_take -i $ID
! Failed to take snapshot: Operation already in progress
$ snapshot_info -d $ONE
error_code=0
image=<image>
$ snapshot_info -d $ONE --field image
<image>
$ snapshot_info -d $TWO -f error_code
0
$ snapshot_info -d $TWO -f bogus
! Value 'bogus' for argument '--field' is not supported.
$ snapshot_info -d $TWO --json
{"error_code": 0, "image": "<image>"}
$ snapshot_info -d $TWO -j -f error_code
{"error_code": 0}
$ cbtinfo -d $TWO
block_size=65536
device_capacity=4194304
block_count=64
generation_id=<uuid>
changes_number=1
$ snapshot_create -d $ONE -f $DIFF -l 1M
<uuid:OTHER>
! Device or resource busy
$ snapshot_destroy -i $OTHER -j
{"id": "$OTHER"}
$ snapshot_destroy --id $ID
$ snapshot_destroy -i $ID
! Failed to destroy snapshot.: No such device
$ snapshot_collect

$ cbtinfo -d $TWO
block_size=65536
device_capacity=4194304
block_count=64
generation_id=<uuid>
changes_number=1
""",
        names,
    )


def test_snapshots_that_cannot_be(blksnap: Tool, names: Names) -> None:
    blksnap.replay(
        """
$ snapshot_create -d $ONE
! Argument 'file' is missed.
$ snapshot_create -d $ONE -f $DIFF
! Argument 'limit' is missed.
$ snapshot_create -d $ONE -f $DIFF -l G
! stoll
$ snapshot_create -d $ONE -f $DIFF -l 1GiB
! Failed to create snapshot object.: No space left on device
$ snapshot_create -d $ONE -f $DIFF -l -1G
! Failed to create snapshot object.: Invalid argument
$ snapshot_create -d $ONE -f $NOTHING -l 1G
! Failed to create snapshot object.: No such file or directory
$ snapshot_create -d $ONE -f /dev/null -l 1G
! Failed to create snapshot object.: Invalid argument
$ snapshot_create -d $ONE -f $LARGE -l 1M
! Failed to create snapshot object.: No space left on device
$ snapshot_create -d $ONE -d $ONE -f $DIFF -l 1M
<uuid:TWICE>
! Operation already in progress
$ snapshot_create -d $ONE -f $DIFF -l 1M -j
{"id": "<uuid>"}
! {"error": "StasisError", "message": "Device or resource busy", "hint": "one.img is in the snapshot $TWICE (a \
device is in one snapshot at most; stasis snapshot destroy $TWICE)", "exit_code": 1, "errno": 16}
$ snapshot_create -f $DIFF -l 1M -d $NOTHING
<uuid:EMPTY>
! Failed to open block device [$NOTHING]: No such file or directory
$ snapshot_take -i $EMPTY
! Failed to take snapshot: No such device
$ snapshot_create -f $TWO -l 8M -d $TWO
<uuid>
! Device or resource busy
$ snapshot_take
! Argument 'id' is missed.
$ snapshot_take -i $NOBODY
! Failed to take snapshot: No such process
$ snapshot_take -i garbage
! Failed to take snapshot: No such process
$ snapshot_destroy
! Argument 'id' is missed.
$ snapshot_destroy -i $NOBODY
! Failed to destroy snapshot.: No such device
$ snapshot_add -d $ONE
! Argument 'id' is missed.
$ snapshot_add -d $ONE -i $NOBODY
! No such process
$ snapshot_info -d $LARGE
! No such file or directory
""",
        names,
    )


def test_adding_a_device_attaches_it(blksnap: Tool, names: Names) -> None:
    blksnap.replay(
        """
$ snapshot_create -f $DIFF -l 1M
<uuid:ID>
$ cbtinfo -d $ONE
! No such file or directory
$ snapshot_add --device $ONE --id $ID -j
{"id": "$ID", "device": "$ONE"}
$ attach -d $ONE
Already was attached
$ snapshot_take -i $ID -j
{"id": "$ID", "devices": ["$ONE"], "frozen": []}
$ snapshot_add -d $TWO -i $ID
! Operation already in progress
""",
        names,
    )


NAMES = [*COMMANDS, *REPLACED, "tracker_remove", "help", "bogus"]
WORDS = [
    *("-d", "-dX", "--dev=/dev/null", "/dev/null", "-i", "x", "--id=1", "-f", "/nowhere", "--f", "-l", "1G"),
    *("--limit=", "-j", "-t", "5", "-r", "0:1", "--ranges", "--", "-h", "-z", "--bogus", "-jd", "--help"),
]


@settings(max_examples=200)
@given(st.sampled_from(NAMES), st.lists(st.sampled_from(WORDS), max_size=6))
def test_whatever_is_given_a_failure_is_one_line(name: str, words: list[str]) -> None:
    """Or one object with --json; and the exit code is 0 or 1. There is no daemon here, and none can be started."""
    out, err = io.StringIO(), io.StringIO()
    before = os.environ.get("STASIS_RUN_DIR")
    os.environ["STASIS_RUN_DIR"] = "/proc/none"
    handler = signal.getsignal(signal.SIGINT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([name, *words])
    finally:
        signal.signal(signal.SIGINT, handler)
        os.environ.pop("STASIS_RUN_DIR")
        if before is not None:
            os.environ["STASIS_RUN_DIR"] = before
    assert (code, err.getvalue().count("\n")) in ((0, 0), (1, 1)), (name, words, err.getvalue())
    assert code or out.getvalue().startswith(("Usage:", name, "detach"))
