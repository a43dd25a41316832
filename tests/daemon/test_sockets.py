# SPDX-License-Identifier: Apache-2.0
"""Addresses to listen on, and who may be let in without TLS."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from stasis.daemon import sockets
from stasis.errors import DaemonError, UsageError
from tests.nbd.certificates import make_certificates


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:10809", "127.0.0.1", 10809), ("[::1]:1", "::1", 1), ("localhost:0", "localhost", 0)],
)
def test_addresses(text: str, host: str, port: int) -> None:
    options = sockets.parse_address(text)
    assert (options.host, options.port, options.tls) == (host, port, False)


@pytest.mark.parametrize("text", ["", "everywhere", ":10809", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        sockets.parse_address(text)


@pytest.mark.tool("openssl")
def test_others_are_let_in_only_if_they_prove_who_they_are(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)[0]
    for host in ("0.0.0.0", "192.0.2.1", "[::]", "disks.example"):
        with pytest.raises(UsageError, match="anybody"):
            sockets.parse_address(f"{host}:10809")
        assert sockets.parse_address(f"{host}:10809", certificates=str(certificates)).tls
    (certificates / "ca-cert.pem").unlink()  # TLS, but clients are not asked for a certificate
    assert sockets.parse_address("127.0.0.1:10809", certificates=str(certificates)).tls
    with pytest.raises(UsageError, match="anybody"):
        sockets.parse_address("0.0.0.0:10809", certificates=str(certificates))


def test_keys_that_cannot_be_used_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        sockets.parse_address("0.0.0.0:10809", psk=str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"server-cert\.pem"):
        sockets.parse_address("127.0.0.1:10809", certificates=str(tmp_path))


def test_the_images_of_a_snapshot_get_ports_in_a_row() -> None:
    options = sockets.parse_address("127.0.0.1:2000")
    assert [sockets.nth_port(options, index).port for index in range(3)] == [2000, 2001, 2002]
    assert sockets.nth_port(sockets.parse_address("127.0.0.1:0"), 2).port == 0


def test_a_unix_socket_is_private_and_replaces_a_stale_one(short_dir: Path) -> None:
    path = short_dir / "s"
    sockets.listen_unix(path).close()
    with sockets.listen_unix(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_port_that_is_taken() -> None:
    with sockets.listen_tcp(sockets.parse_address("127.0.0.1:0")) as first:
        port = first.getsockname()[1]
        with pytest.raises(DaemonError, match=str(port)):
            sockets.listen_tcp(sockets.parse_address(f"127.0.0.1:{port}"))
