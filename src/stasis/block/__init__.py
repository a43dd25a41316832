# SPDX-License-Identifier: Apache-2.0
"""The block engine: served devices, change tracking, copy-on-write snapshots and their images."""
