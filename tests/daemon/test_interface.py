# SPDX-License-Identifier: Apache-2.0
"""The varlink interface says what the daemon does, and others can speak it without our client."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import varlink

import stasis as api
from stasis.daemon import model
from stasis.daemon.interface import FILE, NAME, description
from stasis.daemon.service import Methods

INTERFACE = varlink.Interface(description())
TYPES = ["Device", "Storage", "SnapshotDevice", "Snapshot", "Event", "MapInfo", "Extent", "Status", "Tracer"]
METHODS = [name for name, member in INTERFACE.members.items() if hasattr(member, "in_type")]


@pytest.mark.parametrize("name", TYPES)
def test_types_are_the_models(name: str) -> None:
    fields = list(INTERFACE.members[name].type.fields)
    assert fields == [field.name for field in dataclasses.fields(getattr(model, name))]


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_what_the_interface_says(name: str) -> None:
    wanted = list(INTERFACE.get_method(name).in_type.fields)
    parameters = inspect.signature(getattr(Methods, name)).parameters
    assert [parameter for parameter in parameters if parameter != "self" and parameter[0] != "_"] == wanted


def test_the_file_is_that_of_the_interface() -> None:
    assert FILE.name == f"{NAME}.varlink"
    assert re.search(rf"^interface {re.escape(NAME)}$", description(), re.MULTILINE)


class _Raw:
    """A varlink peer that knows nothing but the wire format."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.socket.sendall(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")
        answer = b""
        while not answer.endswith(b"\0"):
            data = self.socket.recv(4096)
            assert data, "the daemon closed the connection"
            answer += data
        return dict(json.loads(answer[:-1]))


@pytest.fixture
def raw(client: api.Client) -> Any:
    peer = _Raw(client.directories.control_socket)
    with peer.socket:
        yield peer


def test_the_daemon_describes_itself(raw: _Raw) -> None:
    info = raw.call("org.varlink.service.GetInfo")["parameters"]
    assert (info["product"], info["version"]) == ("stasis", api.__version__)
    assert NAME in info["interfaces"]
    told = raw.call("org.varlink.service.GetInterfaceDescription", interface=NAME)
    assert told["parameters"]["description"] == description()


def test_errors_carry_everything_that_the_command_line_shows(raw: _Raw) -> None:
    answer = raw.call(f"{NAME}.ShowDevice", name="none")
    assert answer["error"] == f"{NAME}.Failed"
    assert answer["parameters"] == api.NotFoundError("there is no device none",
                                                     hint="attached devices: none").as_dict()


def test_paths_must_be_absolute(raw: _Raw) -> None:
    assert raw.call(f"{NAME}.Attach", path="disk.img")["parameters"]["error"] == "UsageError"
    answer = raw.call(f"{NAME}.CreateSnapshot", devices=[], storage="storage")
    assert answer["parameters"]["error"] == "UsageError"


@pytest.mark.parametrize(
    "call",
    [b"{", b"[]", b"5", b'{"method": 5}', b'{"method": "org.stasis.Nothing"}', b"\xff\xfe", b'"x"',
     b'{"method": "org.stasis.ShowDevice", "parameters": 5}', b'{"method": "org.stasis.ShowDevice"}',
     b'{"method": "org.stasis.MarkChanged", "parameters": {"device": "x", "ranges": [{"offset": "y"}]}}'],
)
@pytest.mark.filterwarnings("error")
def test_nonsense_ends_that_connection_at_most(client: api.Client, raw: _Raw, call: bytes) -> None:
    raw.socket.sendall(call + b"\0")
    answer = raw.socket.recv(65536)
    assert answer == b"" or b'"error"' in answer
    assert client.status().devices == 0


def test_a_call_that_never_ends_is_cut_off(client: api.Client, raw: _Raw) -> None:
    with pytest.raises(OSError):
        raw.socket.sendall(b"x" * (64 << 20))
    assert client.status().devices == 0
