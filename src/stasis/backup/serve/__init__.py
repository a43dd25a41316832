# SPDX-License-Identifier: Apache-2.0
"""Backups read in place: as NBD exports, read-only or with scratch space, and what differs between two of them."""
