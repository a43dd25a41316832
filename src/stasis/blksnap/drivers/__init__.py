# SPDX-License-Identifier: Apache-2.0
"""Kernel modules behind one interface: the generations of blksnap, and dattobd."""

from __future__ import annotations

from stasis.blksnap.drivers.base import Driver, DriverEvent, Held, Image, Tracked
from stasis.blksnap.drivers.probe import DRIVERS, probe

__all__ = ["DRIVERS", "Driver", "DriverEvent", "Held", "Image", "Tracked", "probe"]
