# SPDX-License-Identifier: Apache-2.0
"""Live devices: disks that stay in the kernel's hands while they are tracked and copied."""
