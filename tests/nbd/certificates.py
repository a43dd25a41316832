# SPDX-License-Identifier: Apache-2.0
"""Certificates for the TLS tests, made by openssl, in the directory layout of qemu and libnbd."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["make_certificates"]


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def _authority(directory: Path) -> None:
    _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
             "-subj", "/CN=test authority", "-keyout", directory / "ca-key.pem",
             "-out", directory / "ca-cert.pem")  # fmt: skip


def _signed(directory: Path, authority: Path, role: str) -> None:
    key, asked, made = (directory / f"{role}-{part}.pem" for part in ("key", "request", "cert"))
    names = directory / "names.cnf"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-subj", "/CN=localhost", "-keyout", key, "-out", asked)  # fmt: skip
    _openssl("x509", "-req", "-days", "2", "-in", asked, "-CA", authority / "ca-cert.pem",
             "-CAkey", authority / "ca-key.pem", "-CAcreateserial", "-extfile", names, "-out", made)  # fmt: skip


def make_certificates(root: Path) -> tuple[Path, Path, Path]:
    """(server's directory, client's directory, directory of a client whose authority is another one)."""
    server, client, stranger = (root / name for name in ("server", "client", "stranger"))
    for directory in (server, client, stranger):
        directory.mkdir()
    _authority(server)
    _authority(stranger)
    _signed(server, server, "server")
    _signed(client, server, "client")
    _signed(stranger, stranger, "client")
    for directory in (client, stranger):
        (directory / "ca-cert.pem").write_bytes((server / "ca-cert.pem").read_bytes())
    return server, client, stranger
