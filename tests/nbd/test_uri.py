# SPDX-License-Identifier: Apache-2.0
"""Addresses as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stasis.errors import UsageError
from stasis.nbd.uri import NbdUri

_words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd+unix:///disk?socket=/run/s", NbdUri("disk", socket="/run/s")),
        ("nbd+unix:///?socket=/run/a%20b", NbdUri("", socket="/run/a b")),
        ("nbds+unix://bob@/d%2F1?socket=/s", NbdUri("d/1", socket="/s", tls=True, user="bob")),
        ("nbd://localhost/", NbdUri("", host="localhost")),
        ("nbd://localhost", NbdUri("", host="localhost")),
        ("nbds://host:1234/x", NbdUri("x", host="host", port=1234, tls=True)),
        ("nbd://[::1]:5/x", NbdUri("x", host="::1", port=5)),
    ],
)
def test_parse(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri


def test_text_of_a_unix_address_is_what_the_tools_take() -> None:
    assert str(NbdUri("disk", socket="/run/stasis/nbd/disk.sock")) == (
        "nbd+unix:///disk?socket=/run/stasis/nbd/disk.sock"
    )
    assert str(NbdUri("sda@1f", socket="/s")) == "nbd+unix:///sda@1f?socket=/s"


@pytest.mark.parametrize("text", ["", "disk", "http://x/", "nbd+unix:///disk", "nbd://host:port/x", "nbd://[::1/x"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        NbdUri.parse(text)


@given(_words, _words)
def test_round_trip(export: str, socket: str) -> None:
    uri = NbdUri(export, socket=socket)
    assert NbdUri.parse(str(uri)) == uri
