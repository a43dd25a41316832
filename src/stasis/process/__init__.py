# SPDX-License-Identifier: Apache-2.0
"""The process engine: stopping a process tree, writing what it consists of to an image set, and bringing it back.

The image set is CRIU's (docs/formats/process-images.md).
"""
