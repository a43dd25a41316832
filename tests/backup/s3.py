# SPDX-License-Identifier: Apache-2.0
"""A real S3-compatible server for tests: started once, a prefix of its bucket per repository.

`tools/setup-s3` installs it, and `make test` runs that. conftest.py makes the fixtures known to all tests here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["S3Server", "s3_server", "s3_url", "start"]

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "build" / "s3server"
SCRIPT = ROOT / "tools" / "s3server" / "server.js"
BUCKET = "backups"


@dataclass
class S3Server:
    """The running server. `environment` is what a client of it needs, as users of S3 set it."""

    process: subprocess.Popen[str]
    port: int
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "S3RVER",
            "AWS_SECRET_ACCESS_KEY": "S3RVER",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def new_url(self) -> str:
        """A place for a repository that nobody else uses."""
        return f"s3://{BUCKET}/{secrets.token_hex(8)}"

    def folder(self, url: str) -> Path:
        """Where the server keeps the objects of a repository."""
        return self.directory / url.removeprefix("s3://")

    def misbehave(self, kind: str, count: int) -> None:
        """Answer the next requests with 503 (`fail`), drop their connections (`cut`), list late (`lag`); 0 ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(kind, count, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "ok\n"

    def stop(self) -> None:
        """The server ends when its standard input does."""
        self.process.communicate(timeout=30)


def start(directory: Path) -> S3Server:
    """Start a server that keeps its objects in a directory; skips the test where it is not installed."""
    node = shutil.which("node")
    if node is None or not (INSTALLED / "installed").exists():
        pytest.skip("needs the S3 server: make test installs it where there is npm, which make deps installs")
    environment = {"PATH": os.environ["PATH"], "NODE_PATH": str(INSTALLED / "node_modules")}
    process = subprocess.Popen([node, str(SCRIPT), str(directory / "objects"), BUCKET], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the S3 server ended with {process.wait()}"
    return S3Server(process, int(line), directory / "objects")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server of this test session."""
    server = start(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place; this process and its children may use it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.new_url()
