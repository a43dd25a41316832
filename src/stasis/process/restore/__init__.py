# SPDX-License-Identifier: Apache-2.0
"""Restoring: a process tree made from an image set, from outside."""
