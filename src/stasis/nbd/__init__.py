# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol: server, client, and what they share. Knows an Export, not what is behind it."""
