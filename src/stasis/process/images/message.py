# SPDX-License-Identifier: Apache-2.0
"""How messages are declared: classes whose attributes say number, type and label of their fields.

    class VmaEntry(Message):
        start: int = uint64(1, show=HEX)                  # required: no default
        madv: int | None = uint64(9, default=None)        # optional
        tfd: list[EventpollTfdEntry] = message(4, EventpollTfdEntry, factory=list)   # repeated

Type checkers read such a class as they read a dataclass. It is none, because making 130 dataclasses takes longer than
restoring a small process: here a class costs its dictionary. A field that an optional message lacks reads as its
default and is in no instance dictionary, so presence is kept as protobuf keeps it; `has` tells.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar, Self, dataclass_transform

__all__ = [
    "HEX",
    "Field",
    "Message",
    "OpenEnum",
    "boolean",
    "bytestring",
    "enumeration",
    "fixed64",
    "has",
    "int32",
    "int64",
    "message",
    "sint32",
    "sint64",
    "string",
    "uint32",
    "uint64",
]

HEX = "hex"
"""`show` of a field that people read in hexadecimal."""

UNKNOWN = "_unknown"
"""Where an instance keeps the fields that its class does not have, as they were read."""

_MISSING = object()


class OpenEnum(IntEnum):
    """An enumeration that later versions may extend: a number without a name is a member of this one value."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int) or not -(1 << 31) <= value < 1 << 31:
            return None
        member = int.__new__(cls, value)
        member._name_ = str(value)
        member._value_ = value
        return member


class Field:
    """One field of a message. `show` says how people want to read it, see jsonform."""

    __slots__ = ("_of", "default", "kind", "name", "number", "repeated", "required", "show")

    def __init__(
        self, number: int, kind: str, default: Any, factory: Any, show: str, of: type[Any] | str | None
    ) -> None:
        self.name = ""
        self.number = number
        self.kind = kind
        self.repeated = factory is not _MISSING
        self.required = default is _MISSING and not self.repeated
        self.default = default
        self.show = show
        self._of = of

    @property
    def of(self) -> type[Any] | None:
        """The class of a message or an enumeration. Its module may be imported for it, when it is needed first."""
        if isinstance(self._of, str):
            from stasis.process.images.kinds import schema_class

            self._of = schema_class(self._of)
        return self._of

    def bind(self, cls: type[Message], name: str) -> None:
        """Give the field its name, and the class the value that instances without the field show."""
        self.name = name
        if self.kind == "message" and self._of is None:
            self._of = cls
        if self.required or self.repeated:
            delattr(cls, name)
        else:
            setattr(cls, name, self.default)


# The declarations. Without default or factory a field is required; factory=list makes it repeated. They return Any,
# as dataclasses.field does, so that the annotation beside them counts.


def uint32(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "uint32", default, factory, show, None)


def uint64(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "uint64", default, factory, show, None)


def int32(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "int32", default, factory, show, None)


def int64(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "int64", default, factory, show, None)


def sint32(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "sint32", default, factory, show, None)


def sint64(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "sint64", default, factory, show, None)


def fixed64(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "fixed64", default, factory, show, None)


def boolean(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "bool", default, factory, show, None)


def string(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "string", default, factory, show, None)


def bytestring(number: int, *, default: Any = _MISSING, factory: Any = _MISSING, show: str = "") -> Any:
    return Field(number, "bytes", default, factory, show, None)


def enumeration(number: int, of: type[OpenEnum], *, default: Any = _MISSING, factory: Any = _MISSING) -> Any:
    return Field(number, "enum", default, factory, "", of)


def message(number: int, of: type[Message] | str | None, *, default: Any = _MISSING, factory: Any = _MISSING,
            show: str = "") -> Any:
    """A message within a message; `of` None is the class that is being declared, a text as `sockets.InetSkEntry` one of
    another module that is imported for it when it comes."""
    return Field(number, "message", default, factory, show, of)


@dataclass_transform(
    kw_only_default=True,
    field_specifiers=(uint32, uint64, int32, int64, sint32, sint64, fixed64, boolean, string, bytestring, enumeration,
                      message),
)
class Message:
    """Base of all messages. Keyword arguments set fields; None stands for absence."""

    fields_by_name: ClassVar[dict[str, Field]] = {}
    repeated_names: ClassVar[tuple[str, ...]] = ()
    required_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        declared = {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        for name, field in declared.items():
            field.bind(cls, name)
        cls.fields_by_name = declared
        cls.repeated_names = tuple(name for name, field in declared.items() if field.repeated)
        cls.required_names = tuple(name for name, field in declared.items() if field.required)

    def __init__(self, **values: Any) -> None:
        present = self.__dict__
        for name in self.repeated_names:
            present[name] = []
        for name, value in values.items():
            if name not in self.fields_by_name:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            if value is not None:
                present[name] = list(value) if name in self.repeated_names else value

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _present(self) == _present(other)

    __hash__ = None  # type: ignore[assignment]  # messages are mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in _present(self).items())})"


def _present(of: Message) -> dict[str, Any]:
    values = of.__dict__
    names = [*of.fields_by_name, UNKNOWN]
    return {name: values[name] for name in names if values.get(name) is not None and values[name] != []}


def has(of: Message, name: str) -> bool:
    """Whether the message holds the field itself, not only its default; a repeated one at least once."""
    value = of.__dict__.get(name)
    return value is not None and value != []
