# SPDX-License-Identifier: Apache-2.0
"""A tracked root disk over real boots of Debian: its own systemd, and an initramfs made with and without our hook.

    python -m tests.vm.rootboot DIRECTORY [-k 6.12] [-f ext4|xfs] [hook|dracut|units|fsck|late ...]

as root, with the Debian packages of tools/vmtest, debootstrap and e2fsprogs, and a kernel of `tools/vmtest setup`. A
Debian root is made in the directory at the first run, some 400 MB and 1 GB for each case, and pip fetches what stasis
depends on. Without KVM a boot takes one to three minutes.
Each case begins with a new disk; tests/vm/rootguest.py says what each step of it sees. A step is one boot. The last
but one of a case with more than two ends as by a power cut: qemu is killed.

hook    the initramfs of initramfs-tools starts tracking, and mounts the root for writing
dracut  the same with one of dracut
units   without the hook: the root is mounted read-only, and a unit starts tracking before it is mounted for writing
fsck    the same, but the initramfs checks the file system first, which writes to it
late    without the hook, and mounted for writing by the initramfs
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).resolve().parents[2]
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = ("systemd-sysv", "udev", "kmod", "initramfs-tools", "python3", "busybox-static", "zstd", "xfsprogs",
            "dracut-core")
MODULES = ("virtio_pci", "virtio_blk", "virtio-rng", "ext4", "xfs")
SIZE, OTHER_SIZE = "900M", "3G"
BOOT_SECONDS = 900.0
ORDERLY = ("begin", "taken_up", "compare", "new_generation")
BROKEN = ("begin", "new_generation")
LAUNCHER = "#!/usr/bin/python3\nimport sys\nfrom stasis.cli.main import main\nsys.exit(main())\n"
UNIT = """[Unit]
After=multi-user.target stasis-track.service
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh -c 'python3 /opt/stasis/rootguest.py > /dev/ttyS1 2>&1; echo ENDED > /dev/ttyS1; %s'
[Install]
WantedBy=multi-user.target
"""
POWER_OFF = "grep -q power=cut /proc/cmdline && exec sleep infinity; systemctl poweroff"


@dataclasses.dataclass(frozen=True)
class Case:
    """hook: what makes the initramfs with our hook, if any. mount: how it mounts the root. steps: by file system."""

    hook: str
    mount: str
    steps: dict[str, tuple[str, ...]]


CASES = {
    "hook": Case("initramfs-tools", "rw", {"ext4": ORDERLY, "xfs": ORDERLY}),
    "dracut": Case("dracut", "rw", {"ext4": ORDERLY, "xfs": ORDERLY}),
    "units": Case("", "ro fsck.mode=skip", {"ext4": ORDERLY, "xfs": BROKEN}),  # XFS writes its log at each mount
    "fsck": Case("", "ro", {"ext4": BROKEN, "xfs": BROKEN}),
    "late": Case("", "rw", {"ext4": BROKEN, "xfs": BROKEN}),
}


def load_vmtest() -> ModuleType:
    """tools/vmtest as a module: it knows where kernels are."""
    loader = importlib.machinery.SourceFileLoader("vmtest", str(PROJECT / "tools/vmtest"))
    spec = importlib.util.spec_from_loader("vmtest", loader)
    assert spec is not None
    module = sys.modules["vmtest"] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL)


# -- the root ----------------------------------------------------------------------------------------------------------


class Tree:
    """A directory with a Debian system that has stasis."""

    def __init__(self, path: Path, kernel: Path, version: str) -> None:
        self.path, self._kernel, self._version = path, kernel, version

    def make(self) -> None:
        """Debian if it is not there yet; kernel modules and stasis anew."""
        if not (self.path / "usr/bin/systemctl").exists():
            run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, self.path)
        shutil.rmtree(self.path / "usr/lib/modules", ignore_errors=True)
        self._install_modules()
        self._install_stasis()
        self._configure()

    def _install_modules(self) -> None:
        source, target = self._kernel / "tree", self.path / "usr"
        for module in MODULES:
            done = subprocess.run(["modprobe", "-d", source, "-S", self._version, "--show-depends", module],
                                  capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                if line.startswith("insmod "):
                    self._copy(Path(line.split()[1]), source, target)
        for path in (source / "lib/modules" / self._version).glob("modules.[bo]*"):
            self._copy(path, source, target)
        run("depmod", "-b", target, self._version)
        (self.path / f"boot/config-{self._version}").write_text("CONFIG_RD_GZIP=y\nCONFIG_BLK_DEV_INITRD=y\n")

    def _copy(self, path: Path, source: Path, target: Path) -> None:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)

    def _install_stasis(self) -> None:
        place = self.path / "opt/stasis"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(PROJECT / "src/stasis", place / "src/stasis", ignore=shutil.ignore_patterns("__pycache__"))
        needed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
        run(sys.executable, "-m", "pip", "install", "-q", "--target", place / "lib", "--python-version", PYTHON,
            "--only-binary=:all:", "--no-compile", *needed)
        (self.path / "usr/lib/python3/dist-packages/stasis.pth").write_text("/opt/stasis/src\n/opt/stasis/lib\n")
        launcher = self.path / "usr/local/bin/stasis"
        launcher.write_text(LAUNCHER)
        launcher.chmod(0o755)
        shutil.copy(PROJECT / "tests/vm/rootguest.py", place)

    def _configure(self) -> None:
        etc, packaging = self.path / "etc", PROJECT / "packaging"
        for unit in (packaging / "systemd").glob("stasis-track*.service"):
            shutil.copy(unit, etc / "systemd/system")
        run("install", "-D", "-t", self.path / "usr/lib/systemd/system-shutdown",
            packaging / "systemd-shutdown/stasis-track")
        (etc / "systemd/system/step.service").write_text(UNIT % POWER_OFF)
        run("chroot", self.path, "systemctl", "enable", "-q", "stasis-track-root", "stasis-track-early",
            "stasis-track", "step")
        (etc / "initramfs-tools/modules").write_text("".join(f"{name}\n" for name in MODULES))
        (etc / "hostname").write_text("guest\n")

    def make_initrd(self, target: Path, system: str, hook: str = "", record: Path | None = None) -> None:
        """As Debian makes it; by `hook` with our hook, and the record of what is tracked."""
        state, output = self.path / "var/lib/stasis", self.path / "boot/initrd"
        if record is not None:
            run("install", "-D", record, state / "live/vda/device.json")
        with mounted("proc", self.path / "proc", "-t", "proc"), mounted("/dev", self.path / "dev", "--bind"):
            (self._run_dracut if hook == "dracut" else self._run_mkinitramfs)(system, bool(hook))
        shutil.move(output, target)
        shutil.rmtree(state, ignore_errors=True)

    def _run_dracut(self, system: str, hook: bool) -> None:
        if hook:
            run("cp", "-r", PROJECT / "packaging/dracut/90stasis-track", self.path / "usr/lib/dracut/modules.d")
        run("chroot", self.path, "dracut", "--quiet", "--no-hostonly", "--force", "--kver", self._version,
            "--add-drivers", " ".join(MODULES), "--filesystems", system, "/boot/initrd")

    def _run_mkinitramfs(self, system: str, hook: bool) -> None:
        (self.path / "etc/fstab").write_text(f"/dev/vda / {system} defaults 0 1\n")
        settings = self.path / "etc/initramfs-tools/conf.d/test"
        settings.write_text(f"MODULES=list\nCOMPRESS=gzip\nFSTYPE={system}\n")  # there is no disk to look at
        hooks = self.path / "etc/initramfs-tools/hooks/stasis-track"
        script = self.path / "etc/initramfs-tools/scripts/local-premount/stasis-track"
        if hook:
            packaging = PROJECT / "packaging/initramfs-tools"
            run("install", packaging / "hooks/stasis-track", hooks)
            run("install", packaging / "scripts/stasis-track", script)
        run("chroot", self.path, "mkinitramfs", "-o", "/boot/initrd", self._version)
        hooks.unlink(missing_ok=True)
        script.unlink(missing_ok=True)

    def make_disk(self, image: Path, system: str) -> None:
        """A file system with all of it."""
        run("truncate", "-s", SIZE, image)
        run(f"mkfs.{system}", "-q", image)
        place = image.with_suffix(".mounted")
        place.mkdir()
        with mounted(image, place, "-o", "loop"):
            run("cp", "-a", f"{self.path}/.", place)
        place.rmdir()


@contextlib.contextmanager
def mounted(what: str | Path, place: Path, *options: str) -> Iterator[None]:
    run("mount", *options, what, place)
    try:
        yield
    finally:
        run("umount", place)


# -- boots -------------------------------------------------------------------------------------------------------------


class Machine:
    """The disks of one case, which outlive its boots."""

    def __init__(self, directory: Path, kernel: Path, kvm: bool) -> None:
        self.directory, self._kernel, self._kvm = directory, kernel, kvm

    def boot(self, step: str, initrd: Path, arguments: str, power: str) -> None:
        """One boot up to its orderly end, or up to the end of its step, where qemu is killed (power "cut")."""
        out = self.directory / f"out-{step}"
        out.unlink(missing_ok=True)
        command = self._command(out, initrd, f"step={step} power={power} {arguments}")
        with (self.directory / f"qemu-{step}").open("w") as errors:
            qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
            try:
                self._await(qemu, out, until_ended=power == "cut")
            finally:
                qemu.kill()
                qemu.wait()
        text = out.read_text(errors="replace")
        if f"PASSED {step}\n" not in text.replace("\r", ""):
            console = (self.directory / f"console-{step}").read_text(errors="replace")
            raise SystemExit(f"{step} failed; the console ends:\n{console[-3000:]}\nand the step said:\n{text}")

    def _await(self, qemu: subprocess.Popen[bytes], out: Path, *, until_ended: bool) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                qemu.wait(0.5)
                return
            if until_ended and out.exists() and b"ENDED" in out.read_bytes():
                return
        raise SystemExit(f"the guest did not end within {BOOT_SECONDS:g} s; see {self.directory}")

    def _command(self, out: Path, initrd: Path, arguments: str) -> list[str]:
        accelerated = ("-accel", "kvm", "-cpu", "host") if self._kvm else ("-accel", "tcg,thread=multi", "-cpu", "max")
        drives = [word for number, name in enumerate(("root", "other")) for word in (
            "-drive", f"if=none,id=d{number},file={self.directory / name},format=raw,cache=writeback",
            "-device", f"virtio-blk-pci,drive=d{number}")]
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-M", "q35",
            *accelerated, "-m", "1536", "-smp", "2", "-net", "none", "-kernel", str(self._kernel / "vmlinuz"),
            "-initrd", str(initrd), "-device", "virtio-rng-pci", *drives,
            "-append", f"console=ttyS0 root=/dev/vda panic=-1 mitigations=off {arguments}",
            "-serial", f"file:{self.directory / out.name.replace('out', 'console')}", "-serial", f"file:{out}",
        ]  # fmt: skip


def run_case(name: str, system: str, tree: Tree, machine: Machine) -> None:
    case, directory = CASES[name], machine.directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    initrd, record = directory / "initrd", directory / "device.json"
    tree.make_initrd(initrd, system)
    tree.make_disk(directory / "root", system)
    run("truncate", "-s", OTHER_SIZE, directory / "other")
    steps = case.steps[system]
    for number, step in enumerate(steps):
        started = time.monotonic()
        cut = len(steps) > len(BROKEN) and number == len(steps) - 2
        machine.boot(step, initrd, f"rootfstype={system} {case.mount}", "cut" if cut else "off")
        print(f"{system} {name}: {step} PASSED ({time.monotonic() - started:.0f} s)", flush=True)
        if case.hook and number == 0:
            run("debugfs", "-R", f"dump /device.json {record}", directory / "other")
            tree.make_initrd(initrd, system, case.hook, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="hook, dracut, units, late (all)")
    parser.add_argument("-k", "--kernel", help="version or its beginning (the newest)")
    parser.add_argument("-f", "--file-system", choices=("ext4", "xfs"), default="ext4")
    options = parser.parse_intermixed_args()
    if os.geteuid():
        raise SystemExit("rootboot needs root: it makes file systems and a chroot")
    vmtest = load_vmtest()
    version = vmtest.choose(options.kernel)
    kernel = vmtest.kernels_directory() / version
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    tree = Tree(directory / "tree", kernel, version)
    tree.make()
    for name in options.cases or CASES:
        run_case(name, options.file_system, tree, Machine(directory / name, kernel, vmtest.has_kvm()))


if __name__ == "__main__":
    main()
