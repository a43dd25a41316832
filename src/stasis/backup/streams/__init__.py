# SPDX-License-Identifier: Apache-2.0
"""Backups in the shapes of others: as a stream that ssh can carry, and as qcow2 files."""
