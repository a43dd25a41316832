# SPDX-License-Identifier: Apache-2.0
"""blksnap and dattobd: what their kernel modules understand, and how they are driven where one is loaded."""
