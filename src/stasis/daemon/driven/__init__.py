# SPDX-License-Identifier: Apache-2.0
"""Devices that a kernel module tracks and holds: the same calls as on served ones, carried out through its ioctls."""
