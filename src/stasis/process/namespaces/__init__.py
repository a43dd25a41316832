# SPDX-License-Identifier: Apache-2.0
"""Namespaces that a tree has of its own (namespaces(7)): what is in them is dumped and made again, one module each."""
