# SPDX-License-Identifier: Apache-2.0
"""Messages as JSON, in the form of `crit decode`: the schema's field names, enumerations by name, bytes in base64.

With `pretty`, numbers are written as people read them (see notation); both forms are read back. Fields that the
schema does not have are kept in base64 under "unknown_fields", which crit drops.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, TypeVar

from stasis.process.images import notation
from stasis.process.images.message import HEX, UNKNOWN, Field, Message, OpenEnum, has

__all__ = ["FormError", "bytes_from_text", "bytes_text", "from_json", "to_json"]

M = TypeVar("M", bound=Message)

QUOTED = "quoted"
"""`show` of bytes that are mostly text, in quoted-printable: names of unix sockets."""

UNKNOWN_KEY = "unknown_fields"


class FormError(ValueError):
    """JSON that is no such message; says where."""


def to_json(message: Message, *, pretty: bool = False, show: str = "") -> dict[str, Any]:
    """The message as plain values, fields in the order of the schema, absent ones left out.

    `show` is the notation of the fields below a message that has one itself.
    """
    out: dict[str, Any] = {}
    for name, field in message.fields_by_name.items():
        if not has(message, name):
            continue
        value = getattr(message, name)
        below = HEX if HEX in (field.show, show) else ""
        if field.repeated and field.show == notation.ADDRESS and pretty:
            out[name] = notation.text_list(field, value)
        elif field.repeated:
            out[name] = [_value(field, item, pretty, below) for item in value]
        else:
            out[name] = _value(field, value, pretty, below)
    if UNKNOWN in message.__dict__:
        out[UNKNOWN_KEY] = bytes_text(message.__dict__[UNKNOWN])
    return out


def _value(field: Field, value: Any, pretty: bool, show: str) -> Any:
    if field.kind == "message":
        return to_json(value, pretty=pretty, show=show)
    if field.kind == "bytes":
        return _quoted(value) if field.show == QUOTED else bytes_text(value)
    if field.kind == "enum":
        return value.name if isinstance(value, OpenEnum) and not value.name.isdecimal() else int(value)
    if field.kind in ("string", "bool") or not pretty:
        return value
    return notation.text(field, value, show)


def bytes_text(value: bytes) -> str:
    """Bytes in base64 lines of 76 characters, as crit writes them."""
    return base64.encodebytes(value).decode("ascii")


def bytes_from_text(text: object, where: str) -> bytes:
    """The inverse; FormError."""
    if not isinstance(text, str):
        raise FormError(f"{where} is no text")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormError(f"{where} is no base64") from error


def _quoted(value: bytes) -> str:
    text = "".join(chr(byte) if 32 <= byte <= 126 and byte != ord("=") else f"={byte:02X}" for byte in value)
    return text[:-1] + "=20" if text.endswith(" ") else text  # at the end of a line it would be lost


def from_json(cls: type[M], written: object, where: str) -> M:
    """The message that `to_json` wrote. FormError names the place below `where`."""
    if not isinstance(written, dict):
        raise FormError(f"{where} is no object")
    message = cls()
    for name, value in written.items():
        field = cls.fields_by_name.get(name)
        if name == UNKNOWN_KEY:
            message.__dict__[UNKNOWN] = bytes_from_text(value, f"{where}.{name}")
        elif field is None:
            raise FormError(f"{where} has a field {name!r}, which {cls.__name__} does not")
        else:
            message.__dict__[name] = _field_from_json(field, value, f"{where}.{name}")
    for name in cls.required_names:
        if name not in written:
            raise FormError(f"{where} lacks its field {name!r}")
    return message


def _field_from_json(field: Field, written: object, where: str) -> Any:
    if not field.repeated:
        return _value_from_json(field, written, where)
    if not isinstance(written, list):
        raise FormError(f"{where} is no list")
    if field.show != notation.ADDRESS:
        return [_value_from_json(field, item, f"{where}[{index}]") for index, item in enumerate(written)]
    try:
        return notation.parse_list(field, written)
    except ValueError as error:
        raise FormError(f"{where}: {error}") from error


def _value_from_json(field: Field, written: object, where: str) -> Any:
    if field.kind == "message":
        return from_json(field.of or Message, written, where)
    if field.kind == "bytes" and field.show != QUOTED:
        return bytes_from_text(written, where)
    expected = {"string": str, "bytes": str, "bool": bool}.get(field.kind)
    if expected is not None:
        if not isinstance(written, expected):
            raise FormError(f"{where} is no {field.kind}")
        return binascii.a2b_qp(_ascii(written, where)) if field.kind == "bytes" else written
    try:
        if field.kind == "enum":
            return _enum_from_json(field, written)
        return notation.parse(field, written)
    except ValueError as error:
        raise FormError(f"{where}: {error}") from error


def _ascii(text: Any, where: str) -> bytes:
    try:
        return bytes(text, "ascii")
    except UnicodeEncodeError as error:
        raise FormError(f"{where} is no quoted-printable text") from error


def _enum_from_json(field: Field, written: object) -> Any:
    members: Any = field.of
    if isinstance(written, str) and written in members.__members__:
        return members[written]
    return members(notation.parse(field, written))
