# SPDX-License-Identifier: Apache-2.0
"""The contents of tmpfs mounts that only a tree has: a compressed tar archive for each file system, as CRIU has it.

The dumper sends a child into the mount namespace, which copies the mount there, so that nothing that is mounted below
hides anything. The restore unpacks in a child that has the file system as its root: no archive leads out of it.
"""

from __future__ import annotations

import gzip  # noqa: F401  # tarfile would import it where it cannot be found any more
import os
import socket
import tarfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stasis.errors import StasisError
from stasis.linux.namespaces import CLONE_NEWNS, join
from stasis.linux.newmount import clone_tree
from stasis.process.helpers import fork_helper, wait_for_helper
from stasis.process.images.damage import damaged
from stasis.process.namespaces.identities import Identities

if TYPE_CHECKING:
    from stasis.linux.mountinfo import MountInfo
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.setwriter import ImageSetWriter

__all__ = ["fill", "image_name", "write"]

XATTR = "SCHILY.xattr."
"""What GNU tar calls extended attributes in a member's extended header."""
LEVEL = 1


def image_name(device: int) -> str:
    """Of the file system with this number, major << 20 | minor."""
    return f"tmpfs-dev-{device}.tar.gz.img"


def write(root: int, mounts: Sequence[MountInfo], out: ImageSetWriter) -> None:
    """Write the contents of file systems of the mount namespace of process `root`."""
    for mount in mounts:
        fd = _copy(root, mount)
        try:
            with (
                out.create(image_name(mount.device[0] << 20 | mount.device[1])) as file,
                tarfile.open(fileobj=file, mode="w:gz", compresslevel=LEVEL, format=tarfile.PAX_FORMAT) as archive,
            ):
                base = f"/proc/self/fd/{fd}/."
                archive.add(base, arcname=".", filter=lambda member, base=base: _with_attributes(member, base))  # type: ignore[misc]
        finally:
            os.close(fd)


def _with_attributes(member: tarfile.TarInfo, base: str) -> tarfile.TarInfo:
    path, inside = os.path.join(base, member.name), Identities.inside()
    member.uid, member.gid = inside.uid(member.uid), inside.gid(member.gid)
    member.pax_headers = {
        XATTR + name: os.getxattr(path, name, follow_symlinks=False).decode("utf-8", "surrogateescape")
        for name in os.listxattr(path, follow_symlinks=False)
    }
    return member


def _copy(root: int, mount: MountInfo) -> int:
    """A copy of a mount of another mount namespace, without what is mounted below."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = fork_helper()
        if child == 0:
            try:
                join(f"/proc/{root}/ns/mnt", CLONE_NEWNS)
                socket.send_fds(theirs, [b"m"], [clone_tree(mount.target)])
            finally:
                os._exit(0)
        wait_for_helper(child)
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise StasisError(f"the contents of the {mount.fstype} on {mount.target} cannot be reached")
    status = os.fstat(fds[0])
    if (os.major(status.st_dev), os.minor(status.st_dev)) != mount.device:
        os.close(fds[0])
        raise StasisError(f"another mount hides the {mount.fstype} on {mount.target}")
    return fds[0]


def fill(images: ImageSet, device: int, mount: int) -> None:
    """Unpack what an image has into a new file system; nothing where there is no image."""
    try:
        image = images.open_file(image_name(device))
    except FileNotFoundError:
        return
    os.lseek(image, 0, os.SEEK_SET)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.fchdir(mount)
            os.chroot(".")
            with open(image, "rb") as file, tarfile.open(fileobj=file, mode="r:gz") as archive:
                _unpack(archive)
            status = 0
        finally:
            os._exit(status)
    os.close(image)
    if os.waitpid(child, 0)[1]:
        raise damaged(os.path.join(images.path, image_name(device)), 0, "it cannot be unpacked")


def _unpack(archive: tarfile.TarFile) -> None:
    members = archive.getmembers()
    archive.extractall("/", members=members, numeric_owner=True)
    for member in members:
        for name, value in member.pax_headers.items():
            if name.startswith(XATTR):
                os.setxattr(member.name, name.removeprefix(XATTR), value.encode("utf-8", "surrogateescape"),
                            follow_symlinks=False)  # fmt: skip
