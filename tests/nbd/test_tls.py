# SPDX-License-Identifier: Apache-2.0
"""TLS with certificates and with pre-shared keys, between our own ends and with Debian's clients."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stasis.errors import UnsupportedError, UsageError
from stasis.nbd.client import Client
from stasis.nbd.tls import TlsConfig
from stasis.nbd.uri import NbdUri
from tests.nbd.certificates import make_certificates
from tests.nbd.exports import MemoryExport
from tests.nbd.wire import ThreadedServer

MIB = 1 << 20
needs_psk = pytest.mark.skipif(
    not hasattr(ssl.SSLContext, "set_psk_server_callback"), reason="PSK needs Python 3.13 or newer"
)
pytestmark = pytest.mark.tool("openssl")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(certificates: tuple[Path, Path, Path], short_dir: Path) -> Iterator[ThreadedServer]:
    exports = [MemoryExport(16 * MIB)]
    with ThreadedServer(short_dir / "s", exports, tls=TlsConfig(certificates[0]), tcp=True) as server:
        yield server


def address(server: ThreadedServer, *, tls: bool = True) -> NbdUri:
    return NbdUri("disk", host="localhost", port=server.port, tls=tls)


def test_large_data_through_tls(server: ThreadedServer, certificates: tuple[Path, Path, Path]) -> None:
    data = bytes(range(256)) * (5 * MIB // 256)
    with Client.connect(address(server), tls=TlsConfig(certificates[1]), contexts=["base:allocation"]) as client:
        client.pwrite(77, data)
        assert client.pread(77, len(data)) == data
        client.write_many([(n * 4096, b"z" * 4096) for n in range(300)])
        assert client.pread(299 * 4096, 4096) == b"z" * 4096
        assert next(client.extents("base:allocation"))[0] == 0


def test_plain_clients_are_told_to_use_tls(server: ThreadedServer) -> None:
    with pytest.raises(UnsupportedError, match="requires TLS"):
        Client.connect(address(server, tls=False))


def test_clients_of_another_authority_are_refused(
    server: ThreadedServer, certificates: tuple[Path, Path, Path]
) -> None:
    with pytest.raises(OSError), Client.connect(address(server), tls=TlsConfig(certificates[2])) as client:
        client.pread(0, 1)


def test_clients_without_certificate_are_refused(
    server: ThreadedServer, certificates: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "ca-cert.pem").write_bytes((certificates[1] / "ca-cert.pem").read_bytes())
    with pytest.raises(OSError), Client.connect(address(server), tls=TlsConfig(tmp_path)) as client:
        client.pread(0, 1)


def test_the_server_must_have_the_name_that_was_asked_for(
    server: ThreadedServer, certificates: tuple[Path, Path, Path]
) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port))
    with pytest.raises(ssl.SSLCertVerificationError):
        Client(sock, "disk", tls=TlsConfig(certificates[1]), host="example.org")


@pytest.mark.tool("nbdinfo", "nbdcopy")
def test_libnbd_speaks_tls_with_us(
    server: ThreadedServer, certificates: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    uri = f"nbds://localhost:{server.port}/disk?tls-certificates={certificates[1]}"
    info = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=True)
    assert int(info.stdout) == 16 * MIB
    subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True, timeout=60)
    assert (tmp_path / "copy").stat().st_size == 16 * MIB


@pytest.mark.tool("qemu-img")
def test_qemu_speaks_tls_with_us(server: ThreadedServer, certificates: tuple[Path, Path, Path]) -> None:
    options = f"driver=nbd,host=localhost,port={server.port},export=disk,tls-creds=t"
    credentials = f"tls-creds-x509,id=t,endpoint=client,dir={certificates[1]}"
    command = ["qemu-img", "info", "--object", credentials, "--image-opts", options]
    assert "16 MiB" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_unix_sockets_need_no_host_name(certificates: tuple[Path, Path, Path], short_dir: Path) -> None:
    server = ThreadedServer(short_dir / "u", [MemoryExport()], tls=TlsConfig(certificates[0]))
    with server, Client.connect(server.uri(), tls=TlsConfig(certificates[1])) as client:
        assert client.pread(0, 4) == bytes(4)


@pytest.mark.parametrize("missing", ["server-cert.pem", "server-key.pem"])
def test_missing_files_are_named(certificates: tuple[Path, Path, Path], tmp_path: Path, missing: str) -> None:
    for name in {"server-cert.pem", "server-key.pem"} - {missing}:
        (tmp_path / name).write_bytes((certificates[0] / name).read_bytes())
    with pytest.raises(UsageError, match=missing):
        TlsConfig(tmp_path).server_context()


def test_bad_psk_files_and_no_files_at_all(tmp_path: Path) -> None:
    (tmp_path / "psk").write_text("alice:xyz\n")
    for config in (TlsConfig(psk_file=tmp_path / "psk"), TlsConfig(psk_file=tmp_path / "none"), TlsConfig()):
        with pytest.raises(UsageError):
            config.server_context()


@pytest.mark.skipif(hasattr(ssl.SSLContext, "set_psk_server_callback"), reason="this Python has PSK")
def test_psk_on_an_old_python_says_so(tmp_path: Path) -> None:
    (tmp_path / "psk").write_text("alice:0123456789abcdef\n")
    with pytest.raises(UnsupportedError, match=r"needs Python 3\.13"):
        TlsConfig(psk_file=tmp_path / "psk").server_context()


@needs_psk
def test_psk(short_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "psk").write_text("# users\nalice:0123456789abcdef\nbob:fedcba9876543210\n")
    (tmp_path / "wrong").write_text("alice:00\n")
    with ThreadedServer(short_dir / "s", [MemoryExport()], tls=TlsConfig(psk_file=tmp_path / "psk")) as server:
        with Client.connect(server.uri(), tls=TlsConfig(psk_file=tmp_path / "psk", user="bob")) as client:
            client.pwrite(0, b"secret")
            assert client.pread(0, 6) == b"secret"
        with pytest.raises(OSError):
            Client.connect(server.uri(), tls=TlsConfig(psk_file=tmp_path / "wrong", user="alice"))


@needs_psk
@pytest.mark.tool("nbdinfo")
def test_psk_with_libnbd(short_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "psk").write_text("alice:0123456789abcdef\n")
    with ThreadedServer(short_dir / "s", [MemoryExport()], tls=TlsConfig(psk_file=tmp_path / "psk")) as server:
        uri = f"nbds+unix://alice@/disk?socket={server.path}&tls-psk-file={tmp_path}/psk"
        info = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=True)
        assert int(info.stdout) == MIB
