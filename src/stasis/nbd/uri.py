# SPDX-License-Identifier: Apache-2.0
"""NBD addresses as text, as the NBD project defines them (`doc/uri.md`): what users copy from one command to
another."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from stasis.errors import UsageError

__all__ = ["NBD_DEFAULT_PORT", "NbdUri"]

NBD_DEFAULT_PORT = 10809
_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")


@dataclass(frozen=True)
class NbdUri:
    """Where an export is: a unix socket path, or host and port."""

    export: str = ""
    socket: str = ""
    host: str = ""
    port: int = NBD_DEFAULT_PORT
    tls: bool = False
    user: str = ""

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Raises UsageError for anything that is no NBD address."""
        try:
            parts = urlsplit(text)
            port = parts.port or NBD_DEFAULT_PORT
            path = parse_qs(parts.query).get("socket", [""])[0]
        except ValueError as error:
            raise UsageError(f"{text} is no NBD address: {error}") from error
        if parts.scheme not in _SCHEMES:
            raise UsageError(f"{text} is no NBD address", hint="for example nbd+unix:///NAME?socket=PATH")
        unix = parts.scheme.endswith("+unix")
        if unix and not path:
            raise UsageError(f"{text} does not say which socket", hint="end it with ?socket=PATH")
        return cls(
            export=unquote(parts.path.removeprefix("/")),
            socket=path if unix else "",
            host="" if unix else parts.hostname or "localhost",
            port=port,
            tls=parts.scheme.startswith("nbds"),
            user=unquote(parts.username or ""),
        )

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        export = quote(self.export, safe="@:,")
        if self.socket:
            query = urlencode({"socket": self.socket}, quote_via=quote, safe="/@:,")
            return f"{scheme}+unix://{user}/{export}?{query}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == NBD_DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{user}{host}{port}/{export}"
