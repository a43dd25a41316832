# SPDX-License-Identifier: Apache-2.0
"""dattobd in user space: its COW file, its tracer, its commands."""
