# SPDX-License-Identifier: Apache-2.0
"""Shell scripts that know nothing but `blksnap`: disks with ext4 on them, snapshotted while they are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stasis.block import frontend
from tests.blksnap.console.conftest import Tool
from tests.system.helpers import LONG

pytestmark = [
    pytest.mark.root,
    pytest.mark.tool("mkfs.ext4", "e2fsck"),
    pytest.mark.timeout(1600 if LONG else 300),
    pytest.mark.skipif(os.geteuid() == 0 and not frontend.probe(), reason="this host has no way to make a node"),
]

ROUNDS = 20 if LONG else 2

PROLOGUE = """
work=$(dirname $PWD)/work
mkdir -p $work/mnt $work/image $work/diff
cd $work
loader=
clean() {
    status=$?
    stop_load
    for target in image mnt; do
        for attempt in 1 2 3 4 5; do mountpoint -q $target || break; umount $target || sleep 0.2; done
    done
    exit $status
}
stop_load() { touch stop; [ -z "$loader" ] || wait $loader; loader=; }
trap clean EXIT
expect() {  # text, command...: it fails with exactly this line
    wanted=$1; shift
    if said=$("$@" 2>&1); then echo "$* did not fail"; exit 1; fi
    [ "$said" = "$wanted" ] || { echo "$*: $said"; exit 1; }
}
fails() { if "$@" > /dev/null 2>&1; then echo "$* did not fail"; exit 1; fi; }
node_of() { blksnap attach --device $1 --json | sed 's/.*"node": "\\([^"]*\\)".*/\\1/'; }
fill() {  # directory: files of all sizes
    mkdir -p $1
    for size in 0 1 511 4096 4097 65536 300000 1000003; do head -c $size /dev/urandom > $1/$size; done
}
load() {  # directory: write, remove and rename until stopped
    while [ ! -e stop ]; do
        mkdir -p $1
        head -c 700000 /dev/urandom > $1/new
        sync -d $1/new
        mv $1/new $1/old
    done
}
"""


def _run(blksnap: Tool, script: str) -> str:
    result = blksnap.script(PROLOGUE + script, timeout=1500 if LONG else 200)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(autouse=True)
def _disks(blksnap: Tool) -> None:
    work = blksnap.directory.parent / "work"
    work.mkdir()
    for name in ("one.img", "two.img"):
        with (work / name).open("wb") as file:
            file.truncate(48 << 20)


def test_backups_of_a_file_system_under_load(blksnap: Tool) -> None:
    """Each image holds every file that was there, passes fsck, and does not change; increments by the map are whole."""
    _run(
        blksnap,
        f"""
blksnap attach -d one.img
node=$(node_of one.img)
mkfs.ext4 -q -F $node
mount $node mnt
load mnt/load & loader=$!
last=0
for round in $(seq {ROUNDS}); do
    fill mnt/files-$round
    rm -rf reference
    cp -a mnt/files-$round reference
    id=$(blksnap snapshot_create --device one.img --file diff --limit 200M)
    blksnap snapshot_watcher --id $id > watcher & watcher=$!
    blksnap snapshot_take --id $id
    image=$(blksnap snapshot_info --device $node --field image)
    rm -rf mnt/files-$round
    fill mnt/files-$round
    before=$(sha256sum < $image)
    e2fsck -f -n $image
    mount -o ro,noload $image image
    diff -r reference image/files-$round
    umount image

    number=$(blksnap cbtinfo -d one.img | sed -n 's/^changes_number=//p')
    generation=$(blksnap cbtinfo -d one.img | sed -n 's/^generation_id=//p')
    [ $number = $round ]
    [ $round = 1 ] || [ $generation = $first ]
    first=$generation
    blksnap readcbtmap -d one.img -f map
    [ $(stat -c %s map) = 768 ]
    [ $round != 1 ] || dd if=$image of=backup bs=1M status=none
    od -An -v -tu1 -w1 map | awk -v last=$last '$1 > last {{ print NR - 1 }}' | while read block; do
        dd if=$image of=backup bs=64K skip=$block seek=$block count=1 conv=notrunc status=none
    done
    cmp $image backup
    last=$number

    [ "$(sha256sum < $image)" = "$before" ]
    blksnap snapshot_destroy --id $id
    wait $watcher
    printf 'Start snapshot watcher.\\nSnapshot not found\\nSnapshot watcher finished\\n' | cmp - watcher
done
stop_load
umount mnt
e2fsck -f -n $node
blksnap detach -d $node
expect 'No such file or directory' blksnap cbtinfo -d one.img
""",
    )


def test_storage_grows_to_its_limit_and_then_ends_the_snapshot_only(blksnap: Tool) -> None:
    said = _run(
        blksnap,
        """
node=$(node_of one.img)
other=$(node_of two.img)
dd if=/dev/urandom of=$node bs=1M count=48 status=none
mkfs.ext4 -q -F -E nodiscard $node
mkfs.ext4 -q -F $other
id=$(blksnap snapshot_create -d one.img -f diff -l 24M)
second=$(blksnap snapshot_create -d two.img -f diff -l 24M)
[ "$(blksnap snapshot_collect | sort)" = "$(printf '%s \\n%s \\n\\n' $id $second | sort)" ]
blksnap snapshot_take -i $second
blksnap snapshot_take -i $id
blksnap snapshot_watcher -i $id > watcher & watcher=$!
dd if=/dev/urandom of=$node bs=1M seek=4 count=18 conv=fsync status=none
[ $(blksnap snapshot_info -d one.img -f error_code) = 0 ]
image=$(blksnap snapshot_info -d one.img -f image)
dd if=/dev/urandom of=new bs=1M count=44 status=none
dd if=new of=$node bs=1M seek=4 conv=fsync status=none
wait $watcher
cat watcher
cmp -n 46137344 -i 4194304:0 $node new
[ $(blksnap snapshot_info -d one.img -f error_code) = -28 ]
fails dd if=$image of=/dev/null bs=1M iflag=direct
blksnap snapshot_destroy -i $id

other_image=$(blksnap snapshot_info -d two.img -f image)
cmp $other $other_image
mount $other mnt
fill mnt/files
umount mnt
e2fsck -f -n $other_image > /dev/null
expect 'Failed to take snapshot: No such process' blksnap snapshot_take -i $id
""",
    )
    lines = said.splitlines()
    assert lines[0] == "Start snapshot watcher."
    assert lines[1].endswith("already grow up to 24 MiB. Limit has been reached.")
    assert lines[2].endswith('with error "No space left on device".')
    assert lines[3:] == ["Snapshot watcher finished"]


def test_what_is_written_to_an_image_and_what_is_marked_is_copied_next_time(blksnap: Tool) -> None:
    _run(
        blksnap,
        """
node=$(node_of one.img)
mkfs.ext4 -q -F $node
mount $node mnt
fill mnt/files
id=$(blksnap snapshot_create -d $node -f diff -l 100M)
blksnap snapshot_take -i $id
blksnap snapshot_destroy -i $id
id=$(blksnap snapshot_create -d $node -f diff -l 100M)
blksnap snapshot_take -i $id
blksnap readcbtmap -d $node -f before
[ "$(od -An -v -tu1 -w1 before | sort -nu | tail -1)" -le 2 ]
image=$(blksnap snapshot_info -d $node -f image)
dd if=/dev/urandom of=$image bs=64K seek=700 count=2 oflag=direct status=none
mount $image image
head -c 100000 /dev/urandom > image/in-the-image
umount image
blksnap markdirtyblock -f mnt/files/1000003 > marked
blksnap markdirtyblock -d $node -r 96256:1 96384:1
blksnap readcbtmap -d $node -f after
awk -F '[= ]' '/^allocate range/ { for (s = int($4 / 128); s <= int(($4 + $6 - 1) / 128); s++) print s }' marked > want
printf '700\\n701\\n752\\n753\\n' >> want
od -An -v -tu1 -w1 after | awk '$1 == 2 { print NR - 1 }' > got
[ -z "$(sort -u want | grep -vxFf got)" ]
for block in 700 701 752 753; do fails cmp -n 1 -i $block before after; done
grep -q "^device path: '/dev/block/$(stat -c %Hr:%Lr $node)'$" marked
blksnap snapshot_destroy -i $id
id=$(blksnap snapshot_create -d $node -f diff -l 100M)
blksnap snapshot_take -i $id
blksnap readcbtmap -d $node -f next
od -An -v -tu1 -w1 next | awk '$1 == 3 { print NR - 1 }' > got
[ -z "$(sort -u want | grep -vxFf got)" ]
cp mnt/files/1000003 elsewhere
fails blksnap markdirtyblock -f elsewhere
(blksnap markdirtyblock -f elsewhere || true) > said 2> failed
grep -q '^allocate range: ofs=[0-9]* cnt=[0-9]*$' said
[ "$(cat failed)" = 'No such file or directory' ]
""",
    )


def test_what_is_in_use(blksnap: Tool, short_dir: Path) -> None:
    """A storage on the disk itself is refused, and so is a detach under a mounted file system. Without, it loses the
    image, and no byte of the disk. A snapshot ends under a mounted image, whose readers get errors from then on."""
    _run(
        blksnap,
        """
node=$(node_of one.img)
mkfs.ext4 -q -F $node
mount $node mnt
mkdir mnt/diff
id=$(blksnap snapshot_create -f mnt/diff -l 8M)
expect 'Device or resource busy' blksnap snapshot_add -d one.img -i $id
blksnap snapshot_destroy -i $id
rmdir mnt/diff

fill mnt/files
id=$(blksnap snapshot_create -d one.img -f diff -l 100M)
blksnap snapshot_take -i $id
image=$(blksnap snapshot_info -d one.img -f image)
mount $image image
cat image/files/1000003 > /dev/null
blksnap snapshot_destroy -i $id
fails dd if=$image of=/dev/null bs=1M count=1 iflag=direct
umount image

load mnt/load & loader=$!
id=$(blksnap snapshot_create -d one.img -f diff -l 100M)
blksnap snapshot_take -i $id
image=$(blksnap snapshot_info -d one.img -f image)
expect 'Failed to detach filter from the block device: Device or resource busy' blksnap detach -d one.img
mkdir mnt/here
[ $(blksnap snapshot_info -d one.img -f error_code) = 0 ]
stop_load
umount mnt
mount -o ro,noload $image image
blksnap detach -d one.img
fails cat image/load/*
umount image
e2fsck -f -n one.img
blksnap snapshot_waitevent -i $id -t 1000 > event
grep -qx 'event=corrupted' event
blksnap snapshot_destroy -i $id
[ "$(blksnap attach -d one.img)" = 'Attached successfully' ]
[ "$(blksnap cbtinfo -d one.img | sed -n 's/^changes_number=//p')" = 0 ]
""",
    )
    assert list((short_dir / "run" / "nodes").glob("*@*")) == []
