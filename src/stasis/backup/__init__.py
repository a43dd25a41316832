# SPDX-License-Identifier: Apache-2.0
"""Backups: repositories, and the jobs that fill, read, check and shrink them.

What is backed up comes through `source.PointInTimeSource`; this room does not know where from.
"""
