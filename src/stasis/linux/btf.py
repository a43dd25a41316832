# SPDX-License-Identifier: Apache-2.0
"""BTF, the kernel's description of its own types (Documentation/bpf/btf.rst): reading it, and writing the little that
a program with functions must bring along.

Where a field lies differs between kernels. Each offset is taken from the type that the verifier will check the
program against, so a wrong one cannot be loaded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["VMLINUX", "Btf", "BtfError", "Field", "FunctionType", "read_vmlinux", "write_functions"]

VMLINUX = Path("/sys/kernel/btf/vmlinux")

MAGIC = 0xEB9F
HEADER = struct.Struct("<HBBIIIII")  # magic, version, flags, hdr_len, type_off, type_len, str_off, str_len
TYPE = struct.Struct("<III")  # name_off, info, size or type
MEMBER = struct.Struct("<III")  # name_off, type, offset in bits
PARAMETER = struct.Struct("<II")  # name_off, type
ENUMERATOR = struct.Struct("<Ii")

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF = 1, 2, 3, 4, 5, 6, 8
VOLATILE, CONST, RESTRICT, FUNC_PROTO, VAR, DATASEC = 9, 10, 11, 13, 14, 15
FUNC, DECL_TAG, TYPE_TAG, ENUM64 = 12, 17, 18, 19
MODIFIERS = (TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG)

# Bytes that follow a type of a kind: so many once, and so many for each of its members.
TRAILING = {INT: (4, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FUNC_PROTO: (0, 8),
            VAR: (4, 0), DATASEC: (0, 12), DECL_TAG: (4, 0), ENUM64: (0, 12)}


class BtfError(ValueError):
    """The data is no BTF, or has no such type or field."""


@dataclass(frozen=True)
class Field:
    """A member: offset in bytes from the beginning of the outermost structure, and its type's number."""

    offset: int
    type_id: int


@dataclass(frozen=True)
class FunctionType:
    """A function that `write_functions` describes: all parameters are 64-bit integers, but for a context."""

    name: str
    parameters: int
    takes_context: bool = False


class Btf:
    """The types of a kernel. Raises BtfError for what is damaged or missing."""

    def __init__(self, data: bytes) -> None:
        try:
            magic, _, _, header, type_off, type_len, str_off, str_len = HEADER.unpack_from(data)
        except struct.error as error:
            raise BtfError("cut short") from error
        if magic != MAGIC or header + max(type_off + type_len, str_off + str_len) > len(data):
            raise BtfError("no BTF, or cut short")
        self._data = data[header + type_off : header + type_off + type_len]
        self._strings = data[header + str_off : header + str_off + str_len]
        self._offsets = self._index()

    def _index(self) -> list[int]:
        """Where each type begins; type 0 is void."""
        # Hot: 100000 types and more. One pass with local names takes 60 ms where the plain way takes 200.
        data, end, unpack = self._data, len(self._data), struct.Struct("<4xI").unpack_from
        table = [TRAILING.get(kind, (0, 0)) for kind in range(32)]
        offsets, position = [-1], 0
        try:
            while position < end:
                offsets.append(position)
                info = unpack(data, position)[0]
                once, each = table[info >> 24 & 31]
                position += 12 + once + each * (info & 0xFFFF)
        except struct.error as error:
            raise BtfError("cut short") from error
        if position != end:
            raise BtfError("cut short")
        return offsets

    def _type(self, type_id: int) -> tuple[int, int, int, int]:
        """Name offset, kind, number of members, and size or type."""
        if not 0 < type_id < len(self._offsets):
            raise BtfError(f"no type {type_id}")
        name, info, size = TYPE.unpack_from(self._data, self._offsets[type_id])
        return name, info >> 24 & 31, info & 0xFFFF, size

    def _members(self, type_id: int, layout: struct.Struct) -> list[tuple[int, ...]]:
        start, count = self._offsets[type_id] + TYPE.size, self._type(type_id)[2]
        size = layout.size
        return [layout.unpack_from(self._data, start + i * size) for i in range(count)]

    def _name_offset(self, name: str) -> int:
        found = self._strings.find(b"\0" + name.encode() + b"\0")
        if found < 0:
            raise BtfError(f"nothing is called {name}")
        return found + 1

    def _text(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode(errors="replace")

    def plain(self, type_id: int) -> int:
        """The type behind typedefs and qualifiers."""
        while type_id:
            _, kind, _, target = self._type(type_id)
            if kind not in MODIFIERS:
                return type_id
            type_id = target
        return 0

    def pointed(self, type_id: int) -> int:
        """What a pointer points to, behind typedefs and qualifiers. BtfError if it is no pointer."""
        _, kind, _, target = self._type(self.plain(type_id))
        if kind != PTR:
            raise BtfError(f"type {type_id} is no pointer")
        return self.plain(target)

    def name(self, type_id: int) -> str:
        """A type's own name."""
        return self._text(self._type(type_id)[0]) if type_id else "void"

    def find(self, name: str, kind: int = TYPEDEF) -> int:
        """The number of a named type of a kind."""
        wanted = self._name_offset(name)
        for type_id in range(1, len(self._offsets)):
            offset, _, _ = TYPE.unpack_from(self._data, self._offsets[type_id])
            if offset == wanted and self._type(type_id)[1] == kind:
                return type_id
        raise BtfError(f"no type is called {name}")

    def parameters(self, type_id: int) -> list[int]:
        """Types of the parameters of a function type, through a pointer if need be."""
        type_id = self.plain(type_id)
        if self._type(type_id)[1] == PTR:
            type_id = self.pointed(type_id)
        if self._type(type_id)[1] != FUNC_PROTO:
            raise BtfError(f"type {type_id} is no function")
        return [kind for _, kind in self._members(type_id, PARAMETER)]

    def field(self, type_id: int, name: str) -> Field:
        """A member of a structure or union, also one of an unnamed structure within. BtfError if there is none."""
        found = self._search(self.plain(type_id), name)
        if found is None:
            raise BtfError(f"{self.name(type_id)} has no {name}")
        return found

    def _search(self, type_id: int, name: str) -> Field | None:
        has_bits = TYPE.unpack_from(self._data, self._offsets[type_id])[1] >> 31
        for name_offset, member, bits in self._members(type_id, MEMBER):
            offset = (bits & 0xFFFFFF if has_bits else bits) // 8
            if name_offset and self._text(name_offset) == name:
                return Field(offset, member)
            inner = self.plain(member)
            if not name_offset and self._type(inner)[1] in (STRUCT, UNION):
                deeper = self._search(inner, name)
                if deeper is not None:
                    return Field(offset + deeper.offset, deeper.type_id)
        return None

    def enumerators(self, *names: str) -> dict[str, int]:
        """Values of enumerators by name, from whatever enumeration; those that are not there are left out."""
        wanted = {}
        for name in names:
            found = self._strings.find(b"\0" + name.encode() + b"\0")
            if found >= 0:
                wanted[found + 1] = name
        values: dict[str, int] = {}
        for type_id in range(1, len(self._offsets)):
            info = TYPE.unpack_from(self._data, self._offsets[type_id])[1]
            if info >> 24 & 31 == ENUM:
                for offset, value in self._members(type_id, ENUMERATOR):
                    if offset in wanted:
                        values.setdefault(wanted[offset], value)
        return values


def read_vmlinux() -> Btf:
    """The types of the running kernel. FileNotFoundError if it was built without CONFIG_DEBUG_INFO_BTF."""
    return Btf(VMLINUX.read_bytes())


def write_functions(functions: Sequence[FunctionType]) -> tuple[bytes, list[int]]:
    """BTF with a global function for each of `functions`, and the numbers of their types, in order."""
    strings, types, numbers = b"\0", b"", []

    def named(text: str) -> int:
        nonlocal strings
        strings += text.encode() + b"\0"
        return len(strings) - 1 - len(text.encode())

    # 1: unsigned long of 64 bits; 2: void *
    types += TYPE.pack(named("unsigned long"), INT << 24, 8) + struct.pack("<I", 64) + TYPE.pack(0, PTR << 24, 0)
    following = 3
    for function in functions:
        types += TYPE.pack(0, FUNC_PROTO << 24 | function.parameters, 1)
        for number in range(function.parameters):
            types += PARAMETER.pack(named(f"p{number}"), 2 if function.takes_context else 1)
        types += TYPE.pack(named(function.name), FUNC << 24 | 1, following)  # 1: BTF_FUNC_GLOBAL
        numbers.append(following + 1)
        following += 2
    header = HEADER.pack(MAGIC, 1, 0, HEADER.size, 0, len(types), len(types), len(strings))
    return header + types + strings, numbers
