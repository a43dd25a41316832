# SPDX-License-Identifier: Apache-2.0
"""Open files: one module per kind, with its dump and its restore side by side."""
