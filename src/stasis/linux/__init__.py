# SPDX-License-Identifier: Apache-2.0
"""One file per kernel facility: constants with their header's names and thin typed wrappers.

Nothing in this room knows what stasis is for. Every call raises OSError with the errno of the kernel,
the call's name and, where there is one, the path.
"""
