# SPDX-License-Identifier: Apache-2.0
"""The words of blksnap's console tool: its grammar, its options and its texts. Knows no daemon."""
