# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the backup tests: an S3 server, and object stores that leave nothing behind."""

from __future__ import annotations

import obstore
import pytest
from obstore.store import MemoryStore

from tests.backup.s3 import s3_server, s3_url

__all__ = ["s3_server", "s3_url"]


@pytest.fixture(scope="session", autouse=True)
def _obstore_runtime() -> None:
    """The threads of obstore start with its first use and stay for good; that is no leak of the test that is first."""
    obstore.put(MemoryStore(), "name", b"")
