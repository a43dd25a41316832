# SPDX-License-Identifier: Apache-2.0
"""Which module is loaded, and which generation of its interface it has: asked with calls that change nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable

from stasis.blksnap.drivers.base import Driver
from stasis.blksnap.drivers.dattobd import DattoDriver
from stasis.blksnap.drivers.filters import FilterDriver
from stasis.blksnap.drivers.generations import CURRENT, V5, V6, V7, Generation
from stasis.blksnap.drivers.trackers import TrackerDriver
from stasis.blksnap.kernel import Kernel
from stasis.blksnap.uapi import common, current, dattobd, v2, v5, v7, val7
from stasis.errors import PermissionDeniedError, StasisError, UnsupportedError, UsageError

__all__ = ["DRIVERS", "probe"]

NOBODY = b"stasis-probe"
"""Name of a filter that nobody has: asking for it changes nothing. How it is refused tells generations apart."""
WITHOUT = "attach it without --driver, or stasis track start if it is mounted"
NO_ADDRESS = (1 << 64) - 1
"""As an address outside of every process, and as a descriptor -1."""


def probe(name: str, kernel: Kernel, device: str) -> Driver:
    """The driver of the module of this name. `device` is a block device to ask for filters.

    UnsupportedError if the module is not loaded, or of a generation that is not known.
    """
    try:
        return DRIVERS[name](kernel, device)
    except KeyError:
        raise UsageError(f"there is no driver {name}", hint=f"drivers: {', '.join(DRIVERS)}") from None


def _blksnap(kernel: Kernel, device: str) -> Driver:
    if (kernel.dev / current.CONTROL_NODE).exists():
        return _filters(kernel, str(kernel.dev / current.CONTROL_NODE), device)
    if (kernel.dev / v2.CONTROL_NODE).exists():
        control = str(kernel.dev / v2.CONTROL_NODE)
        return TrackerDriver(kernel, control, _version(kernel, control, v2.IOCTL_BLK_SNAP_VERSION) or "?")
    if (kernel.dev / val7.CONTROL_NODE).exists():
        raise UnsupportedError("the blksnap module of Veeam Agent is loaded, which only Veeam Agent drives",
                               hint=f"do without: {WITHOUT}")
    raise _absent("blksnap", kernel, current.CONTROL_NODE)


def _filters(kernel: Kernel, control: str, device: str) -> Driver:
    version = _version(kernel, control, current.IOCTL_BLKSNAP_VERSION)
    if version is None:
        version = _version(kernel, control, v5.IOCTL_BLKSNAP_VERSION)
        if version is None:
            raise _unknown(control)
        return FilterDriver(kernel, control, V5, version)
    return FilterDriver(kernel, control, _by_filter(kernel, control, device), version)


def _by_filter(kernel: Kernel, control: str, device: str) -> Generation:
    """What is CTL to v7 is ATTACH to 6.15: only 6.15 knows the number that is asked for first."""
    if _knows(kernel, device, current.BLKFILTER_CTL, common.FilterCtl(name=NOBODY)):
        return CURRENT
    if not _knows(kernel, device, v7.BLKFILTER_DETACH, common.FilterName(name=NOBODY)):
        raise _unknown(control)
    refusal = _refusal(kernel, control, current.IOCTL_BLKSNAP_SNAPSHOT_CREATE,
                       current.SnapshotCreate(diff_storage_filename=NO_ADDRESS))
    return V7 if refusal == errno.EFAULT else V6


def _knows(kernel: Kernel, path: str, request: int, argument: common.FilterCtl | common.FilterName) -> bool:
    return _refusal(kernel, path, request, argument) not in (errno.ENOTTY, errno.EOPNOTSUPP)


def _refusal(kernel: Kernel, path: str, request: int,
             argument: common.FilterCtl | common.FilterName | current.SnapshotCreate) -> int:
    """The errno with which a request is refused, 0 if it is not."""
    try:
        with kernel.open(path) as fd:
            kernel.ioctl(fd, "probe", request, argument)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise _denied(path) from error
        return error.errno or errno.EIO
    return 0


def _version(kernel: Kernel, control: str, request: int) -> str | None:
    """The version that the module tells, None if it does not know the request."""
    version = common.Version()
    try:
        with kernel.open(control) as fd:
            kernel.ioctl(fd, "version", request, version)
    except PermissionError as error:
        raise _denied(control) from error
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return None
        raise StasisError(f"{control} does not tell its version: {error.strerror}", errno=error.errno or 0) from error
    return str(version)


def _dattobd(kernel: Kernel, device: str) -> Driver:
    control = kernel.dev / dattobd.CONTROL_NODE
    if not control.exists():
        raise _absent("dattobd", kernel, dattobd.CONTROL_NODE)
    driver = DattoDriver(kernel, str(control))
    driver.free_minor()
    return driver


def _absent(name: str, kernel: Kernel, node: str) -> UnsupportedError:
    return UnsupportedError(f"the kernel module {name} is not loaded: there is no {kernel.dev / node}",
                            hint=f"modprobe {name}; or do without: {WITHOUT}")


def _unknown(control: str) -> UnsupportedError:
    return UnsupportedError(f"the module behind {control} has an interface that stasis does not know",
                            hint=f"do without: {WITHOUT}")


def _denied(path: str) -> StasisError:
    return PermissionDeniedError(f"no permission to open {path}", hint="drivers of kernel modules need root")


DRIVERS: dict[str, Callable[[Kernel, str], Driver]] = {"blksnap": _blksnap, "dattobd": _dattobd}
"""The drivers by name."""
