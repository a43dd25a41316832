# SPDX-License-Identifier: Apache-2.0
"""Dumping: what of a stopped process tree goes into which image."""
