# SPDX-License-Identifier: Apache-2.0
"""CRIU's own Python package and ours read each other's images. Skipped where no interpreter can import it.

Debian's package `criu` brings it for /usr/bin/python3; STASIS_PYCRIU names another interpreter that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stasis.process.images import ImageReader, decode, encode
from stasis.process.images.documents import document_text, encode_document
from stasis.process.images.jsonform import to_json
from stasis.process.images.message import Field, Message, OpenEnum
from stasis.process.images.schema import (
    GhostFileEntry,
    InetSkEntry,
    RegFileEntry,
    SaEntry,
    TcpStreamEntry,
    UnixSkEntry,
    VmaEntry,
)
from tests.process.messages import CLASSES, core, messages, minimal, write_set
from tests.process.programs import stasis
from tests.process.test_images_json import DOCUMENTS
from tests.process.victims import victim

Ask = Callable[..., Any]

# google.protobuf.descriptor.FieldDescriptor
TYPES = {3: "int64", 4: "uint64", 5: "int32", 6: "fixed64", 8: "bool", 9: "string", 11: "message", 12: "bytes",
         13: "uint32", 14: "enum", 17: "sint32", 18: "sint64"}  # fmt: skip
LABEL_REQUIRED, LABEL_REPEATED = 2, 3

# Field 2 of pagemap_entry has its new name since 4.2.
RENAMED = {("pagemapentry", "nr_pages", 2): "compat_nr_pages"}


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Ask CRIU's package; the answer of one request."""
    script = Path(__file__).with_name("pycriu_peer.py")
    for interpreter in filter(None, [os.environ.get("STASIS_PYCRIU"), sys.executable, "/usr/bin/python3"]):
        with subprocess.Popen([interpreter, "-B", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True) as peer:
            assert peer.stdin is not None
            assert peer.stdout is not None
            if not peer.stdout.readline():
                continue

            def answer(**request: Any) -> Any:
                print(json.dumps(request), file=peer.stdin, flush=True)
                line = peer.stdout.readline()
                assert line, f"pycriu failed at {request}"
                return json.loads(line)

            yield answer
            peer.stdin.close()
            return
    pytest.skip("needs pycriu; apt-get install criu, or STASIS_PYCRIU=an interpreter that has it")


@pytest.fixture(scope="module")
def schema(ask: Ask) -> Any:
    return ask(ask="schema")


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def _theirs(schema: Any) -> dict[str, str]:
    return {_key(name): name for name in schema["messages"]}


def test_every_field_is_declared_as_criu_declares_it(schema: Any) -> None:
    ours = {_key(cls.__name__): cls for cls in CLASSES}
    compared = 0
    for name, fields in schema["messages"].items():
        cls = ours.get(_key(name))
        if cls is None:
            continue
        by_number = {field.number: field for field in cls.fields_by_name.values()}
        for field_name, number, kind, label, default, of in fields:
            if of is not None and _key(of) not in ours and kind == 11:
                continue  # other architectures
            field = by_number[number]
            assert field.name == RENAMED.get((_key(name), field_name, number), field_name), name
            assert (field.kind, field.required, field.repeated) \
                == (TYPES[kind], label == LABEL_REQUIRED, label == LABEL_REPEATED), (name, field_name)
            if default is not None and not field.required:
                assert field.default == default, (name, field_name)
            compared += 1
    assert compared > 750


def test_every_enumeration_is_declared_as_criu_declares_it(schema: Any) -> None:
    ours = {_key(field.of.__name__): field.of for cls in CLASSES for field in cls.fields_by_name.values()
            if field.kind == "enum" and field.of is not None}  # fmt: skip
    ours["vendor"] = ours["cpuvendor"]
    theirs = {name: members for name, members in schema["enums"].items() if name != "endianness"}  # of POWER
    assert len(theirs) > 10
    for name, members in theirs.items():
        enum: Any = ours[_key(name)]
        assert members.items() <= {member.name: member.value for member in enum}.items(), name


def _known(schema: Any) -> Callable[[Any, Any], bool]:
    fields = {_key(name): {field[1] for field in fields} for name, fields in schema["messages"].items()}
    members = {_key(name): set(values) for name, values in schema["enums"].items()}
    members["cpuvendor"] = members["vendor"]

    def known(cls: type[Message], field: Field | OpenEnum) -> bool:
        if isinstance(field, OpenEnum):
            return field.name in members[_key(cls.__name__)]
        return field.number in fields.get(_key(cls.__name__), ())

    return known


def test_every_message_is_understood_by_criu(ask: Ask, schema: Any) -> None:
    known, theirs = _known(schema), _theirs(schema)
    classes = [cls for cls in CLASSES if _key(cls.__name__) in theirs]
    assert len(classes) > 100

    @settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(st.sampled_from(classes).flatmap(lambda cls: messages(cls, known)))
    def check(message: Any) -> None:
        cls = type(message)
        name = theirs[_key(cls.__name__)]
        answer = ask(ask="message", name=name, bytes=encode(message).hex(), pretty=False)
        assert decode(cls, bytes.fromhex(answer["bytes"])) == message
        names = {number: field_name for field_name, number, *_ in schema["messages"][name]}  # one was renamed
        shown = {names[cls.fields_by_name[field_name].number]: value for field_name, value in to_json(message).items()}
        assert answer["json"] == shown

    check()


def _filled(cls: type[Any], **values: Any) -> Any:
    message = minimal(cls)
    for name, value in values.items():
        setattr(message, name, value)
    return message


def test_people_read_the_same_in_both(ask: Ask, schema: Any) -> None:
    inet = {"type": 1, "proto": 6, "state": 10}
    samples = [
        VmaEntry(start=0x1000, end=0x2000, pgoff=0, shmid=0, prot=3, flags=0x40022, status=0x201, fd=-1, madv=3),
        _filled(RegFileEntry, flags=0o100002), _filled(GhostFileEntry, dev=0x801, rdev=0x801),
        _filled(InetSkEntry, family=2, src_addr=[0x0100007F], dst_addr=[0], **inet),
        _filled(InetSkEntry, family=10, src_addr=[0, 0, 0, 0x01000000], dst_addr=[0, 0, 0, 0], **inet),
        _filled(UnixSkEntry, type=1, state=7, name=b"\0a=b c\xff"), _filled(SaEntry, mask=1 << 63),
        _filled(TcpStreamEntry, opt_mask=5),
    ]  # fmt: skip
    for message in samples:
        name = _theirs(schema)[_key(type(message).__name__)]
        answer = ask(ask="message", name=name, bytes=encode(message).hex(), pretty=True)
        assert answer["json"] == to_json(message, pretty=True)
    registers = ask(ask="message", name="core_entry", bytes=encode(core(3)).hex(), pretty=True)["json"]["thread_info"]
    assert registers == to_json(core(3), pretty=True)["thread_info"]


def test_criu_decodes_our_images_and_we_encode_what_it_decoded(ask: Ask, tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    for path in sorted((tmp_path / "set").iterdir()):
        if path.name.startswith(("pages", "pagemap")):  # the package of 3.17 has other fields for page counts
            continue
        with ImageReader.open(str(path)) as image:
            ours = json.loads("".join(document_text(image)))
        theirs = ask(ask="load", bytes=path.read_bytes().hex(), pretty=False)
        assert theirs == ours, path.name
        assert encode_document(json.dumps(theirs).encode(), path.name) == path.read_bytes()
        assert ask(ask="dump", image=theirs) == path.read_bytes().hex()


def test_payloads_are_the_same_in_both(ask: Ask) -> None:
    for document in json.loads(json.dumps(DOCUMENTS)):
        if document["magic"].startswith("IPCNS"):
            document["entries"][0]["desc"] = dict.fromkeys(["key", "uid", "gid", "cuid", "cgid", "mode", "id"], 0)
        ours = encode_document(json.dumps(document).encode(), "document").hex()
        assert ask(ask="dump", image=document) == ours
        assert ask(ask="load", bytes=ours, pretty=False) == document


@pytest.mark.root
@pytest.mark.tool("crit")
def test_crit_reads_what_was_dumped(tmp_path: Path) -> None:
    with victim(sys.executable, "-c", "print('ready', flush=True); input()") as process:
        stasis("dump", process.pid, "--images", tmp_path / "images", "--leave-running")
        told = subprocess.run(["crit", "x", tmp_path / "images", "ps"], capture_output=True, text=True, timeout=60)
        assert str(process.pid) in told.stdout, told.stderr
        shown = subprocess.run(["crit", "show", tmp_path / "images" / f"mm-{process.pid}.img"], capture_output=True,
                               text=True, timeout=60)  # fmt: skip
        assert '"mm_start_code"' in shown.stdout, shown.stderr
