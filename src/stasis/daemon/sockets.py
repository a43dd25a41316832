# SPDX-License-Identifier: Apache-2.0
"""Listening sockets. The daemon makes and keeps those of exports, so that clients queue while a worker restarts."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stasis.daemon.paths import check_socket_path
from stasis.errors import DaemonError, UsageError
from stasis.linux import activation

__all__ = ["TcpOptions", "listen_tcp", "listen_unix", "nth_port", "parse_address", "passed_in"]

BACKLOG = 128


@dataclass(frozen=True)
class TcpOptions:
    """Where and how exports are offered over TCP; port 0 lets the kernel choose."""

    host: str
    port: int
    certificates: str | None = None
    psk: str | None = None

    @property
    def tls(self) -> bool:
        return self.certificates is not None or self.psk is not None

    def as_config(self, listener: socket.socket) -> dict[str, Any]:
        """The `tcp` entry of a worker's configuration."""
        return {"listen_fds": [listener.fileno()], "certificates": self.certificates, "psk": self.psk}


def parse_address(text: str, certificates: str | None = None, psk: str | None = None) -> TcpOptions:
    """`ADDR:PORT` or `[ADDR]:PORT` as options. UsageError, also for keys that cannot be used, and UnsupportedError.

    What others can reach is refused unless clients must prove who they are.
    """
    host, separator, port = text.rpartition(":")
    host = host.strip("[]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{text!r} is no address", hint="write ADDR:PORT, as in 192.0.2.1:10809 or [::1]:10809")
    options = TcpOptions(host, int(port), _existing(certificates), _existing(psk))
    if not _is_loopback(host) and not _tells_clients_apart(options):
        raise UsageError(f"{host} can be reached by others, and anybody could read and write the device",
                         hint="add --tls-psk, or --tls-certificates DIR with a ca-cert.pem to verify clients by")
    _check_keys(options)
    return options


def _tells_clients_apart(options: TcpOptions) -> bool:
    if options.certificates is not None:
        return (Path(options.certificates) / "ca-cert.pem").exists()
    return options.psk is not None


def _check_keys(options: TcpOptions) -> None:
    """Find out now whether the keys can be used, and not when a worker that should use them does not start."""
    if not options.tls:
        return
    from stasis.nbd.tls import TlsConfig  # takes the ssl module with it, which few need

    directory, psk = (Path(path) if path else None for path in (options.certificates, options.psk))
    TlsConfig(directory=directory, psk_file=psk).server_context()


def nth_port(options: TcpOptions, index: int) -> TcpOptions:
    """The same for the port `index` places up; port 0 stays 0, which lets the kernel choose."""
    return replace(options, port=options.port and options.port + index)


def _existing(path: str | None) -> str | None:
    if path is None:
        return None
    if not os.path.exists(path):
        raise UsageError(f"{path} does not exist", hint="name the directory or file that holds the TLS keys")
    return os.path.abspath(path)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen_unix(path: Path) -> socket.socket:
    """Listen on a unix socket, mode 0600, in place of a stale one at `path`. DaemonError."""
    check_socket_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise DaemonError(f"cannot listen on {path}: {error.strerror}", errno=error.errno or 0) from error
    return sock


def passed_in(path: Path) -> socket.socket | None:
    """The socket listening at `path` that the service manager passed, None if it passed none.

    UsageError if it passed another one: commands look for the daemon at `path` alone.
    """
    passed = [socket.socket(fileno=fd) for fd, _ in activation.listen_fds()]
    if not passed:
        return None
    names = [str(sock.getsockname()) for sock in passed]
    if names == [str(path)] and passed[0].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return passed[0]
    for sock in passed:
        sock.close()
    raise UsageError(f"the service manager passed {', '.join(names)}, not a socket that listens at {path}",
                     hint=f"write ListenStream={path} in the socket unit, or choose another --run-dir")


def listen_tcp(options: TcpOptions) -> socket.socket:
    """Listen on a TCP address. DaemonError if it is taken or not of this host."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise DaemonError(f"cannot listen on {options.host}:{options.port}: {error.strerror}",
                          hint="choose another --tcp ADDR:PORT", errno=error.errno or 0) from error
