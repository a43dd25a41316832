# SPDX-License-Identifier: Apache-2.0
"""TLS for NBD: certificates in a directory with the file names of qemu and libnbd, or pre-shared keys."""

from __future__ import annotations

import binascii
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stasis.errors import UnsupportedError, UsageError

__all__ = ["TlsConfig"]

_PSK_CIPHERS = "kECDHEPSK:kDHEPSK:kPSK"


@dataclass(frozen=True)
class TlsConfig:
    """Either `directory` (X.509) or `psk_file` (lines of `user:hexkey`, as psktool writes them).

    In the directory a server reads `server-cert.pem` and `server-key.pem`; with `ca-cert.pem` it demands and
    verifies a certificate of every client. A client reads `ca-cert.pem`, and `client-cert.pem` with
    `client-key.pem` where present. `user` is whose key a client uses.
    """

    directory: Path | None = None
    psk_file: Path | None = None
    user: str = ""

    def server_context(self) -> ssl.SSLContext:
        """Raises UsageError for files that are missing or bad, UnsupportedError for PSK before Python
        3.13."""
        if self.psk_file is not None:
            return _psk_server(read_psk_file(self.psk_file))
        directory = self._directory()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load_certificate(context, directory, "server")
        authority = directory / "ca-cert.pem"
        if authority.exists():
            _load_authority(context, authority)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """As `server_context`; the server's certificate is verified against `ca-cert.pem`."""
        if self.psk_file is not None:
            return _psk_client(read_psk_file(self.psk_file), self.user)
        directory = self._directory()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load_authority(context, directory / "ca-cert.pem")
        if (directory / "client-cert.pem").exists():
            _load_certificate(context, directory, "client")
        return context

    def _directory(self) -> Path:
        if self.directory is None:
            raise UsageError("TLS needs a directory of certificates or a PSK file")
        return self.directory


def _load_certificate(context: ssl.SSLContext, directory: Path, role: str) -> None:
    certificate, key = directory / f"{role}-cert.pem", directory / f"{role}-key.pem"
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"cannot use {certificate} with {key}: {error}") from error


def _load_authority(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise UsageError(f"cannot use {path}: {error}") from error


def read_psk_file(path: Path) -> dict[str, bytes]:
    """Keys by user. Raises UsageError when the file cannot be read or has a line that is not
    `user:hexkey`."""
    try:
        lines = path.read_text().splitlines()
        pairs = (line.rsplit(":", 1) for line in lines if line.strip() and not line.startswith("#"))
        return {user: binascii.unhexlify(key.strip()) for user, key in pairs}
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot use the PSK file {path}: {error}", hint="its lines are user:hexkey") from error


def _psk_server(keys: dict[str, bytes]) -> ssl.SSLContext:
    context: Any = _psk_context(ssl.PROTOCOL_TLS_SERVER)
    # An empty key makes the library refuse the client, which is what an unknown user deserves.
    context.set_psk_server_callback(lambda identity: keys.get(identity or "", b""))
    return context  # type: ignore[no-any-return]


def _psk_client(keys: dict[str, bytes], user: str) -> ssl.SSLContext:
    if user not in keys:
        raise UsageError(f"no key for user {user!r} in the PSK file")
    context: Any = _psk_context(ssl.PROTOCOL_TLS_CLIENT)
    context.set_psk_client_callback(lambda hint: (user, keys[user]))
    return context  # type: ignore[no-any-return]


def _psk_context(protocol: int) -> ssl.SSLContext:
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        raise UnsupportedError(
            "TLS with pre-shared keys needs Python 3.13 or newer", hint="use certificates, or a newer Python"
        )
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Python's callbacks are those of TLS 1.2; the key itself authenticates both sides.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    return context
