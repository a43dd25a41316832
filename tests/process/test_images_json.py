# SPDX-License-Identifier: Apache-2.0
"""Images as JSON and back: crit's form, the form for people, and what is wrong with a document."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stasis.errors import UsageError
from stasis.process.images import ImageReader
from stasis.process.images.documents import document_text, encode_document
from stasis.process.images.jsonform import from_json, to_json
from stasis.process.images.schema import (
    CoreEntry,
    GhostFileEntry,
    InetSkEntry,
    MemfdInodeEntry,
    PagemapEntry,
    RegFileEntry,
    UnixSkEntry,
    VmaEntry,
)
from tests.process.messages import CLASSES, core, messages, minimal, write_set


def _changed(cls: type[Any], **values: Any) -> Any:
    message = minimal(cls)
    for name, value in values.items():
        setattr(message, name, value)
    return message


def _pretty(message: Any, *names: str) -> list[Any]:
    shown = to_json(message, pretty=True)
    assert from_json(type(message), json.loads(json.dumps(shown)), "here") == message
    return [shown[name] for name in names]


@settings(max_examples=80)
@given(st.sampled_from(CLASSES).flatmap(messages), st.booleans())
def test_every_message_survives_the_way_through_json(message: Any, pretty: bool) -> None:
    written = json.dumps(to_json(message, pretty=pretty))
    assert from_json(type(message), json.loads(written), "here") == message


def test_people_read_addresses_flags_devices_and_names() -> None:
    mapping = VmaEntry(start=0x1000, end=0x2000, pgoff=0, shmid=0, prot=3, flags=0x40022, status=0x201, fd=-1)
    assert _pretty(mapping, "start", "prot", "flags", "status", "fd") == [
        "0x1000", "PROT_READ | PROT_WRITE", "MAP_PRIVATE | MAP_ANON | 0x40000", "VMA_AREA_REGULAR | VMA_ANON_PRIVATE",
        -1]
    assert _pretty(_changed(RegFileEntry, flags=0o100002), "flags") == ["O_RDWR | O_LARGEFILE"]
    assert _pretty(_changed(RegFileEntry, flags=0), "flags") == [""]
    assert _pretty(PagemapEntry(vaddr=4096, compat_nr_pages=1, flags=6), "vaddr", "flags") \
        == ["0x1000", "PE_LAZY | PE_PRESENT"]
    assert _pretty(_changed(GhostFileEntry, dev=0x801, rdev=0x801), "dev", "rdev") == ["0:2049", "8:1"]
    assert _pretty(_changed(MemfdInodeEntry, seals=9), "seals") == ["F_SEAL_SEAL | F_SEAL_WRITE"]
    socket = _changed(InetSkEntry, family=2, type=1, proto=6, state=10, src_addr=[0x0100007F], dst_addr=[0, 0, 0, 1])
    assert _pretty(socket, "family", "type", "proto", "state", "src_addr", "dst_addr") \
        == ["INET", "STREAM", "TCP", "LISTEN", ["127.0.0.1"], ["::100:0"]]
    assert _pretty(_changed(UnixSkEntry, name=b"\0a=b c\xff"), "name") == ["=00a=3Db c=FF"]
    assert to_json(core(1), pretty=True)["thread_info"]["gpregs"]["ip"] == "0x0"


def test_a_stopped_task_is_not_a_zombie_and_crits_word_is_read() -> None:
    stopped = core(1)
    assert stopped.tc is not None
    stopped.tc.task_state = 3
    shown = to_json(stopped, pretty=True)
    assert shown["tc"]["task_state"] == "TASK_STOPPED"
    shown["tc"]["task_state"] = "Zombie"
    assert from_json(CoreEntry, shown, "here") == stopped


def test_a_file_is_the_same_after_decode_and_encode(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    for path in sorted((tmp_path / "set").iterdir()):
        if path.name.startswith("pages"):
            continue
        for pretty in (False, True):
            with ImageReader.open(str(path)) as image:
                text = "".join(document_text(image, pretty=pretty))
            assert encode_document(text.encode(), "document") == path.read_bytes(), path.name
            assert list(json.loads(text)) == ["magic", "entries"]
            assert (text.count("\n") == 1) is not pretty


DOCUMENTS = [
    {"magic": "IPCNS_SEM", "entries": [{"nsems": 3, "extra": [1, 2, 3]}]},
    {"magic": "IPCNS_MSG", "entries": [{"qbytes": 3, "qnum": 1, "extra": [{"mtype": 1, "msize": 3}, "YWJj\n"]}]},
    {"magic": "GHOST_FILE", "entries": [{"uid": 0, "gid": 0, "mode": 1, "chunks": True},
                                        {"len": 3, "off": 4096, "extra": "YWJj\n"}]},
    {"magic": "GHOST_FILE", "entries": [{"uid": 0, "gid": 0, "mode": 1, "extra": "YWJj\n"}]},
    {"magic": "TCP_STREAM", "entries": [{"inq_len": 3, "inq_seq": 1, "outq_len": 2, "outq_seq": 1, "opt_mask": 1,
                                         "snd_wscale": 1, "mss_clamp": 1,
                                         "extra": {"outq": "YWI=\n", "inq": "YWJj\n"}}]},
]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["magic"])
def test_payloads_are_in_crits_form(document: Any, tmp_path: Path) -> None:
    document = json.loads(json.dumps(document))
    if document["magic"].startswith("IPCNS"):
        document["entries"][0]["desc"] = dict.fromkeys(["key", "uid", "gid", "cuid", "cgid", "mode", "id"], 0)
    (tmp_path / "image").write_bytes(encode_document(json.dumps(document).encode(), "document"))
    with ImageReader.open(str(tmp_path / "image")) as image:
        assert json.loads("".join(document_text(image))) == document


FIELDS = {"pid": 1, "ppid": 0, "pgid": 1, "sid": 1}
WRONG = [
    ("{", "is no JSON"), ("[]", 'no object with "magic" and "entries"'), ('{"magic": "X", "entries": []}', "'X' is no"),
    ("[" * 100000, "is no JSON"), ("\xff", "is no JSON"),
    ([3], r"entries\[0\] is no object"), ([{**FIELDS, "uid": 1}], "has a field 'uid'"),
    ([{"pid": 1}], "lacks its field 'ppid'"), ([{**FIELDS, "pid": -1}], r"PstreeEntry\.pid: -1 is no uint32"),
    ([{**FIELDS, "pid": "x"}], r"entries\[0\]\.pid: invalid literal"), ([{**FIELDS, "pid": None}], "is no number"),
    ([{**FIELDS, "pid": True}], "is no number"), ([{**FIELDS, "threads": 1}], "threads is no list"),
    ([{**FIELDS, "threads": [1, 1.5]}], r"threads\[1\]: 1\.5 is no number"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "reason"), WRONG)
def test_what_is_wrong_with_a_document_is_told_with_its_place(document: Any, reason: str) -> None:
    text = document if isinstance(document, str) else json.dumps({"magic": "PSTREE", "entries": document})
    with pytest.raises(UsageError, match=reason):
        encode_document(text.encode("latin-1"), "document")


@pytest.mark.parametrize(("entry", "extra", "reason"), [
    ({"pipe_id": 1, "bytes": 3}, "YWI=", "extra does not fit"), ({"pipe_id": 1, "bytes": 3}, "@", "no base64"),
    ({"pipe_id": 1, "bytes": 3}, 3, "is no text"), ({"pipe_id": 1, "bytes": 3}, None, "does not fit"),
])
def test_payloads_that_do_not_fit_are_told(entry: dict[str, Any], extra: Any, reason: str) -> None:
    document = {"magic": "PIPES_DATA", "entries": [{**entry, "extra": extra}]}
    with pytest.raises(UsageError, match=reason):
        encode_document(json.dumps(document).encode(), "document")


_JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                     lambda inner: st.one_of(st.lists(inner, max_size=3),
                                             st.dictionaries(st.sampled_from(["pid", "sid", "extra", "qnum", "desc",
                                                                              "len", "chunks"]), inner, max_size=3)),
                     max_leaves=6)


@settings(max_examples=60)
@given(st.sampled_from(["PSTREE", "GHOST_FILE", "IPCNS_MSG", "IPCNS_SEM", "TCP_STREAM", "PAGEMAP"]),
       st.lists(_JSON, max_size=3))
def test_any_document_is_an_image_or_an_error(magic: str, entries: list[Any]) -> None:
    try:
        encoded = encode_document(json.dumps({"magic": magic, "entries": entries}).encode(), "document")
    except UsageError as error:
        assert error.message.startswith("document")
    else:
        assert io.BytesIO(encoded).read(4) == bytes.fromhex("19 43 56 54")
