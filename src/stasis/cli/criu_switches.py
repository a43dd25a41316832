# SPDX-License-Identifier: Apache-2.0
"""The switches of criu: which are there, which mean nothing or the same here, and how their words are read."""

from __future__ import annotations

import re

from stasis.errors import UnsupportedError, UsageError

__all__ = [
    "ANYWAY", "NOT_HERE", "NOT_IMPLEMENTED", "OF_DUMPS", "OF_RESTORES", "OTHER_COMMANDS", "brought", "cgroup_root",
    "inherited", "outside",
]  # fmt: skip

OTHER_COMMANDS = ("swrk", "service", "page-server", "lazy-pages", "dedup", "cpuinfo", "exec", "show")
"""Commands of criu that are not there."""
NOT_IMPLEMENTED = (
    "--join-ns", "-J", "--lazy-pages", "--page-server", "--exec-cmd", "--root", "-r", "--auto-dedup", "--stream",
    "--evasive-devices", "--config", "--empty-ns", "--lsm-profile", "--irmap-scan-path", "--cpu-cap", "--weak-sysctls",
    "--allow-uprobes", "-L", "--libdir", "--cgroup-props", "--cgroup-props-file", "--cgroup-dump-controller",
    "--cgroup-yard", "--cgroup-root", "--lsm-mount-context", "--skip-mnt", "--enable-fs", "--file-validation",
    "--skip-file-rwx-check", "--log-pid", "--address", "--port", "--ps-socket", "--daemon", "--status-fd",
    "--tls", "--tls-cacert", "--tls-cacrl", "--tls-cert", "--tls-key", "--tls-no-cn-verify", "--ext-mount-map",
    "--veth-pair", "--enable-external-sharing", "--enable-external-masters",
)  # fmt: skip
"""Switches of criu that mean something which is not done here."""
NOT_HERE = ("--freeze-cgroup", "--track-mem", "--leave-stopped", "-s")
"""The same where they are given to another command than those that have them."""
ANYWAY = {
    "--no-default-config": "no configuration file is read in any case",
    "--force-irmap": "the paths of watched files are always looked up",
    "--display-stats": "figures are in stats-dump and stats-restore in any case",
    "--mntns-compat-mode": "there is one way to make mounts",
    "--unprivileged": "what the rights of the caller do not reach is named in any case",
    "--ghost-fiemap": "holes of deleted files are always looked for",
}
"""Switches whose meaning is what happens here."""
OF_DUMPS: dict[str, int | str] = {
    "--tcp-established": 0, "--tcp-close": 0, "--file-locks": 0, "-l": 0, "--ext-unix-sk": 0, "-x": 0,
    "--shell-job": 0, "-j": 0, "--link-remap": 0, "--skip-in-flight": 0, "--leave-running": 0, "-R": 0,
    "--ghost-limit": 1, "--network-lock": 1, "--action-script": 1, "--manage-cgroups": "?", "--external": 1,
}  # fmt: skip
"""Switches with which scripts dump, and how many words follow; criu takes them with the other commands as well, where
they mean nothing."""
OF_RESTORES: dict[str, int | str] = {
    "--restore-detached": 0, "-d": 0, "--restore-sibling": 0, "-S": 0, "--pidfile": 1, "--inherit-fd": 1,
}  # fmt: skip
"""The same for those of a restore."""
OUTSIDE = r"(?:unix|file|tty)\[[^\]]+\]|mnt\[\]"
"""What is left outside at a dump: sockets, files, terminals, and mounts that are there as well, which always are."""
OTHERWISE = {
    "mnt": "mounts that are outside as well are found by themselves; stasis process restore --map-path names others",
    "dev": "mounts that are outside as well are found by themselves; stasis process restore --map-path names others",
    "net": "a tree that shares the network namespace of the command has that of the restore",
    "veth": "the names of other ends are for the restore",
}
"""Of kinds that criu has, what does it here."""
BROUGHT = r"(veth|mnt)\[([^\]]+)\]:(.+)"
"""At a restore: the other end of a network device, or what stands for a mount that was outside."""
INHERITED = re.compile(r"fd\[(\d+)\]:(.+)")



def outside(text: str) -> str:
    """Of `--external` at a dump."""
    match = re.fullmatch(OUTSIDE, text)
    if match is None:
        way = next((way for kind, way in OTHERWISE.items() if text.startswith(f"{kind}[")), "")
        kinds = "there are unix[INODE], file[MOUNT:INODE], tty[RDEV:DEV] and mnt[]"
        raise UnsupportedError(f"--external {text} is not implemented", hint=way or kinds)
    return text


def brought(text: str) -> tuple[str, str, str]:
    """Of `--external` at a restore: kind, name in the images, and what stands for it. `mnt[]` names nothing: mounts
    that are outside as well are found in any case."""
    match = re.fullmatch(BROUGHT, text)
    if text == "mnt[]":
        return "mnt", "", ""
    if match is None:
        raise UnsupportedError(f"--external {text} is not implemented", hint="there are veth[IN]:OUT, mnt[KEY]:PATH "
                               "and mnt[]; files come by --inherit-fd")  # fmt: skip
    return match[1], match[2], match[3]


def cgroup_root(text: str) -> tuple[str, str]:
    """Controller, which may be "", and group."""
    controller, _, path = text.rpartition(":")
    if not path.startswith("/"):
        raise UsageError(f"{text!r} is no control group", hint="write [CONTROLLER:]/GROUP, as in cpu:/restored")
    return controller, path


def inherited(text: str) -> tuple[str, int]:
    """What the images call it, and the descriptor."""
    match = INHERITED.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no inherited descriptor", hint="write fd[N]:RES, as in fd[3]:pipe:[4711]")
    return match[2], int(match[1])
