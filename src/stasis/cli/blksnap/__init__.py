# SPDX-License-Identifier: Apache-2.0
"""The `blksnap` command: blksnap's console tool over stasis's daemon."""
