# SPDX-License-Identifier: Apache-2.0
"""The supervisor: it owns the registry of devices and snapshots and serves the control API; no data passes it."""
