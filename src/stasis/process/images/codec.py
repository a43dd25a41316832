# SPDX-License-Identifier: Apache-2.0
"""Messages to bytes and back.

Reading is strict: lengths against the end of the message that holds them, numbers against their type, required fields
against the schema, and depth and number of nested messages against a limit. Fields that the schema does not have are
kept and written again behind the others. Writing emits every required field, even where it equals its default,
because protobuf-c refuses a message that lacks one; repeated numbers are written one by one and read packed too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeVar

from stasis.process.images.message import UNKNOWN, Field, Message
from stasis.process.images.wire import (
    FIXED64,
    LENGTH,
    VARINT,
    WireError,
    read_length,
    read_varint,
    signed,
    skip,
    unzigzag,
    varint,
    zigzag,
)

__all__ = ["FieldError", "decode", "encode", "prepare"]

MAX_DEPTH = 64
MAX_MESSAGES = 1 << 20  # in one record; the kernel's default allows a task 65530 mappings

M = TypeVar("M", bound=Message)
_FIXED64 = struct.Struct("<Q")
_RANGES = {
    "uint32": (0, 1 << 32),
    "uint64": (0, 1 << 64),
    "int32": (-(1 << 31), 1 << 31),
    "int64": (-(1 << 63), 1 << 63),
    "sint32": (-(1 << 31), 1 << 31),
    "sint64": (-(1 << 63), 1 << 63),
    "fixed64": (0, 1 << 64),
    "bool": (0, 2),
    "enum": (-(1 << 31), 1 << 31),
}


class FieldError(ValueError):
    """A value that its field cannot hold, or a required field without a value; names class and field."""


# Writing.


def encode(message: Message) -> bytes:
    """The message's bytes, fields in the order of the schema. Raises FieldError."""
    out = bytearray()
    _encode_into(out, message)
    return bytes(out)


def _encode_into(out: bytearray, message: Message) -> None:
    values = message.__dict__
    for name, (required, write) in _writers(type(message)).items():
        value = values.get(name)
        if value is None:
            if required:
                raise FieldError(f"{type(message).__name__}.{name} is required")
            continue
        try:
            write(out, value)
        except (TypeError, AttributeError, UnicodeEncodeError, struct.error) as error:
            raise FieldError(f"{type(message).__name__}.{name} cannot hold {value!r:.80}") from error
        except OverflowError as error:
            raise FieldError(f"{type(message).__name__}.{name}: {error}") from error
    out += values.get(UNKNOWN, b"")


Writer = Callable[[bytearray, Any], None]
_WRITERS: dict[type[Message], dict[str, tuple[bool, Writer]]] = {}


def _writers(cls: type[Message]) -> dict[str, tuple[bool, Writer]]:
    """Of each field whether it is required, and what appends its tag and value, or all values of a repeated one."""
    found = _WRITERS.get(cls)
    if found is None:
        found = {name: (field.required, _writer(field)) for name, field in cls.fields_by_name.items()}
        _WRITERS[cls] = found
    return found


def prepare(*classes: type[Message]) -> None:
    """Make now what the first message of a class needs to be written, and all that it consists of: up to 0.5 ms each,
    which a tree that stands still need not wait for."""
    for cls in classes:
        if cls not in _WRITERS:
            _writers(cls)
            prepare(*(field.of for field in cls.fields_by_name.values() if field.kind == "message" and field.of))


def _tag(field: Field) -> bytes:
    return varint(field.number << 3 | _wire_type(field))


def _wire_type(field: Field) -> int:
    if field.kind in ("string", "bytes", "message"):
        return LENGTH
    return FIXED64 if field.kind == "fixed64" else VARINT


def _writer(field: Field) -> Writer:
    if field.kind in ("sint32", "sint64"):
        return _number_writer(field, lambda value: varint(zigzag(value)))
    if field.kind == "fixed64":
        return _number_writer(field, _FIXED64.pack)
    if field.kind == "message":
        return _tagged(field, _write_message(field.of))
    if field.kind == "string":
        return _tagged(field, _write_string)
    return _tagged(field, _write_bytes) if field.kind == "bytes" else _number_writer(field, varint)


def _tagged(field: Field, write: Writer) -> Writer:
    tag = _tag(field)

    def write_one(out: bytearray, value: Any) -> None:
        out += tag
        write(out, value)

    def write_all(out: bytearray, values: Any) -> None:
        for value in values:
            write_one(out, value)

    return write_all if field.repeated else write_one


def _number_writer(field: Field, form: Callable[[int], bytes]) -> Writer:
    """Repeated numbers are written at once: the registers of a thread are hundreds."""
    low, behind = _RANGES[field.kind]
    tag = _tag(field)

    def write_one(out: bytearray, value: int) -> None:
        if not low <= value < behind:
            raise OverflowError(f"{value} is no {field.kind}")
        out += tag + form(value)

    def write_all(out: bytearray, values: list[int]) -> None:
        if values and not low <= min(values) <= max(values) < behind:
            raise OverflowError(f"{min(values)} or {max(values)} is no {field.kind}")
        out += b"".join([tag + form(value) for value in values])

    return write_all if field.repeated else write_one


def _write_string(out: bytearray, value: str) -> None:
    # Paths are strings in the schema and any bytes on Linux: they travel as in os.fsdecode.
    _write_bytes(out, value.encode("utf-8", "surrogateescape"))


def _write_bytes(out: bytearray, value: bytes | bytearray) -> None:
    out += varint(len(value))
    out += value


def _write_message(of: type[Any] | None) -> Writer:
    def write(out: bytearray, value: Message) -> None:
        if type(value) is not of:
            raise TypeError
        inner = bytearray()
        _encode_into(inner, value)
        _write_bytes(out, inner)

    return write


# Reading.

Reader = Callable[[bytes, int, int], tuple[Any, int]]
_Slots = dict[int, tuple[Field, bool, Reader | None]]
_SLOTS: dict[type[Message], _Slots] = {}


def decode(cls: type[M], buffer: bytes, start: int = 0, end: int | None = None) -> M:
    """The message in `buffer[start:end]`. Raises WireError with the offset into `buffer`."""
    message = cls()
    _decode_into(message, buffer, start, len(buffer) if end is None else end, [MAX_MESSAGES, MAX_DEPTH])
    return message


def _decode_into(message: Message, buffer: bytes, at: int, end: int, left: list[int]) -> None:
    """Fields of `buffer[at:end]`; `left` is how many messages, and how many levels of them, may still come."""
    cls, values, start = type(message), message.__dict__, at
    slots = _SLOTS.get(cls) or _slots(cls)
    while at < end:
        tag_at, tag = at, buffer[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = read_varint(buffer, at, end)
        slot = slots.get(tag)
        if slot is None:
            at = skip(buffer, tag, at, end)
            values[UNKNOWN] = values.get(UNKNOWN, b"") + buffer[tag_at:at]
            continue
        field, packed, read = slot
        if read is None:
            at = _decode_nested(values, field, buffer, at, end, left)
            continue
        value, at = read(buffer, at, end)
        if packed:
            values[field.name] += value
        elif field.repeated:
            values[field.name].append(value)
        else:
            values[field.name] = value
    for name in cls.required_names:
        if name not in values:
            raise WireError(f"{cls.__name__} lacks its field {name}", start)


def _decode_nested(values: dict[str, Any], field: Field, buffer: bytes, at: int, end: int, left: list[int]) -> int:
    """A message in a message; one that comes twice in a field that is not repeated is merged, as protobuf has it."""
    begin, behind = read_length(buffer, at, end)
    left[0] -= 1
    left[1] -= 1
    if min(left) < 0:
        raise WireError("too many messages lie in one record" if left[0] < 0 else "messages are nested too deep", at)
    of: type[Message] = field.of  # type: ignore[assignment]
    inner = of() if field.repeated else values.get(field.name) or of()
    _decode_into(inner, buffer, begin, behind, left)
    left[1] += 1
    if field.repeated:
        values[field.name].append(inner)
    else:
        values[field.name] = inner
    return behind


def _slots(cls: type[Message]) -> _Slots:
    """How each tag of a class is read. A repeated number has two tags, one of them for the packed form."""
    slots: _Slots = {}
    for field in cls.fields_by_name.values():
        wire_type = _wire_type(field)
        read = None if field.kind == "message" else _reader(field)
        slots[field.number << 3 | wire_type] = (field, False, read)
        if field.repeated and wire_type != LENGTH and read is not None:
            slots[field.number << 3 | LENGTH] = (field, True, _packed_reader(read))
    _SLOTS[cls] = slots
    return slots


def _reader(field: Field) -> Reader:
    if field.kind == "fixed64":
        return _read_fixed64
    if field.kind == "string":
        return _read_string
    if field.kind == "bytes":
        return _read_bytes
    if field.kind == "uint64":
        return read_varint
    if field.kind == "bool":
        return _number_reader("uint64", bool)
    if field.kind == "enum":
        return _number_reader("int32", field.of or int)
    return _number_reader(field.kind, None)


def _number_reader(kind: str, form: Callable[[int], Any] | None) -> Reader:
    """Reader of a varint that must lie in the range of `kind`."""
    low, behind = _RANGES[kind]
    convert = unzigzag if kind.startswith("sint") else signed if kind.startswith("int") else None

    def read(buffer: bytes, at: int, end: int) -> tuple[Any, int]:
        if at < end and buffer[at] < 0x80:  # most numbers are one byte
            value, after = buffer[at], at + 1
        else:
            value, after = read_varint(buffer, at, end)
        if convert is not None:
            value = convert(value)
        if not low <= value < behind:
            raise WireError(f"{value} is no {kind}", at)
        return (value if form is None else form(value)), after

    return read


def _packed_reader(read: Reader) -> Reader:
    def read_packed(buffer: bytes, at: int, end: int) -> tuple[list[Any], int]:
        begin, behind = read_length(buffer, at, end)
        values = []
        while begin < behind:
            value, begin = read(buffer, begin, behind)
            values.append(value)
        return values, behind

    return read_packed


def _read_fixed64(buffer: bytes, at: int, end: int) -> tuple[int, int]:
    if end - at < _FIXED64.size:
        raise WireError("a number is cut off", at)
    return _FIXED64.unpack_from(buffer, at)[0], at + _FIXED64.size


def _read_bytes(buffer: bytes, at: int, end: int) -> tuple[bytes, int]:
    begin, behind = read_length(buffer, at, end)
    return bytes(buffer[begin:behind]), behind


def _read_string(buffer: bytes, at: int, end: int) -> tuple[str, int]:
    begin, behind = read_length(buffer, at, end)
    return str(buffer[begin:behind], "utf-8", "surrogateescape"), behind
