# SPDX-License-Identifier: Apache-2.0
"""The devices that kernel modules track: attach, detach, and what is found again by a daemon that starts."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from stasis.blksnap.drivers import DRIVERS, Driver, Tracked, probe
from stasis.blksnap.kernel import Kernel
from stasis.daemon import record
from stasis.daemon.paths import Directories
from stasis.daemon.record import SERVED, DeviceRecord
from stasis.errors import BusyError, DaemonError, NotFoundError, PermissionDeniedError, StasisError, UsageError

__all__ = ["DrivenDevice", "DrivenDevices"]

log = logging.getLogger(__name__)


@dataclass
class DrivenDevice:
    """A device and its module. Without a `driver` nothing is known of it at the moment; `failure` says why."""

    record: DeviceRecord
    tracked: Tracked
    driver: Driver | None = None
    failure: StasisError | None = None

    @property
    def name(self) -> str:
        return self.record.name

    def require(self) -> Driver:
        """The driver. Raises what keeps the device from being tracked."""
        if self.driver is None:
            raise self.failure or DaemonError(f"{self.name} is not tracked at the moment", hint="try again")
        return self.driver


class DrivenDevices:
    """All of them. Not thread-safe: the daemon's lock is held around every call."""

    def __init__(self, directories: Directories, kernel: Kernel) -> None:
        self._directories = directories
        self._kernel = kernel
        self.devices: dict[str, DrivenDevice] = {}

    def find(self, name: str) -> DrivenDevice:
        """The device of this name. NotFoundError."""
        try:
            return self.devices[name]
        except KeyError:
            known = ", ".join(sorted(self.devices)) or "none"
            raise NotFoundError(f"no kernel module tracks a device {name}", hint=f"attached ones: {known}") from None

    def attach(self, wanted: DeviceRecord) -> None:
        """Have the module track a device. UnsupportedError if it is not loaded; else what the module says."""
        record.valid_name(wanted.name)
        self._directories.check_export(wanted.name)
        self._refuse(wanted)
        directory = self._directories.device(wanted.name)
        device = self._device(wanted)
        is_new = not directory.exists()
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            self._begin(device)
            self.save(device)
        except BaseException:
            if is_new:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        self.devices[wanted.name] = device

    def _device(self, wanted: DeviceRecord) -> DrivenDevice:
        tracked = Tracked(wanted.name, wanted.path, self._directories.device(wanted.name) / "map", notes=wanted.notes)
        return DrivenDevice(wanted, tracked)

    def _refuse(self, wanted: DeviceRecord) -> None:
        if wanted.driver not in DRIVERS:
            raise UsageError(f"there is no driver {wanted.driver}", hint=f"drivers: {', '.join([SERVED, *DRIVERS])}")
        if wanted.kernel or wanted.tracking_block or wanted.buffered or wanted.tcp or wanted.bitmaps:
            raise UsageError(f"a device that {wanted.driver} tracks is not served, so it takes no options of serving",
                             hint="give --name and --driver only")
        if wanted.name in self.devices:
            raise BusyError(f"there is a device {wanted.name} already, {self.devices[wanted.name].record.path}",
                            hint="choose another name with --name")
        key = record.origin_key(wanted.path)
        for other in self.devices.values():
            if key is not None and record.origin_key(other.record.path) == key:
                raise BusyError(f"{wanted.path} is attached already, as {other.name}",
                                hint=f"stasis device detach {other.name}")

    def _begin(self, device: DrivenDevice) -> None:
        path = device.record.path
        try:
            number = self._kernel.number(path)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} does not exist", hint="name a block device") from error
        except PermissionError as error:
            raise PermissionDeniedError(f"no permission to look at {path}", hint="run as root") from error
        if number is None:
            raise UsageError(f"{path} is no block device", hint="kernel modules track block devices only")
        driver = probe(device.record.driver, self._kernel, path)
        driver.attach(device.tracked)
        device.driver, device.failure = driver, None

    def save(self, device: DrivenDevice) -> None:
        """Remember the device, and what its driver noted."""
        record.save(self._directories.device(device.name), device.record)

    def detach(self, device: DrivenDevice, *, forget: bool) -> None:
        """Have the module let go; a module that is not there any more has done so by itself."""
        if device.driver is not None:
            device.driver.detach(device.tracked)
        device.record.attached = False
        device.record.notes.clear()
        self.save(device)
        del self.devices[device.name]
        if forget:
            shutil.rmtree(self._directories.device(device.name), ignore_errors=True)

    def refresh(self, device: DrivenDevice) -> None:
        """Look at a device anew: find its module again, if need be track it again in a new generation."""
        try:
            self._begin(device)
        finally:
            self.save(device)

    def recover(self) -> None:
        """Take up what an earlier daemon had. A module that was unloaded since then knows nothing of it any more."""
        for directory in sorted(self._directories.devices.iterdir()):
            wanted = _load(directory)
            if wanted is None or wanted.driver == SERVED or not wanted.attached:
                continue
            device = self.devices[wanted.name] = self._device(wanted)
            try:
                self.refresh(device)
            except StasisError as error:
                log.error("%s is not tracked: %s", device.name, error)
                device.failure = error


def _load(directory: Path) -> DeviceRecord | None:
    """The record, None where there is none to be used: the keeper of served devices tells of damaged ones."""
    try:
        return record.load(directory)
    except (FileNotFoundError, StasisError):
        return None
