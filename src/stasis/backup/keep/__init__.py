# SPDX-License-Identifier: Apache-2.0
"""Keeping a repository in order: what to forget, what to delete, and whether all is there and whole."""
