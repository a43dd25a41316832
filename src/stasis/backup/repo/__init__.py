# SPDX-License-Identifier: Apache-2.0
"""The repository: a store of objects, keys, chunks, indexes, manifests and locks (docs/formats/repository.md)."""
