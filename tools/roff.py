# SPDX-License-Identifier: Apache-2.0
"""The Markdown that our guide uses, as roff for manual pages: paragraphs, lists, code blocks, tables, inline marks."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["escape", "from_markdown"]


def escape(text: str) -> str:
    """Plain text as a line of roff: no character of it is a command (groff_char(7))."""
    return _guard(_plain(text))


def _plain(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")


def _guard(line: str) -> str:
    return "\\&" + line if line.startswith((".", "'")) else line


def from_markdown(text: str) -> str:
    """Roff of a piece of Markdown. Headings become bold lines; links keep their text only."""
    return "\n".join(line for block in _blocks(text) for line in _block(block))


def _blocks(text: str) -> Iterator[list[str]]:
    """Lines between blank lines; a fenced code block is one block, blank lines and all."""
    block: list[str] = []
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        if line or fenced:
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _block(block: list[str]) -> list[str]:
    if block[0].startswith("```"):
        return [".PP", ".RS 4", ".EX", *(escape(line) for line in block[1:-1]), ".EE", ".RE"]
    if block[0].startswith("|"):
        return _table(block)
    if block[0].startswith("* "):
        return _list(block)
    if block[0].startswith("#"):
        return [".PP", _bold(block[0].lstrip("# "))]
    return [".PP", _inline(" ".join(line.strip() for line in block))]


def _list(block: list[str]) -> list[str]:
    items = "\n".join(block).removeprefix("* ").split("\n* ")
    return [line for item in items for line in (r".IP \(bu 2", _inline(" ".join(item.split())))]


def _table(block: list[str]) -> list[str]:
    """Each row as a tagged paragraph, its first cell as the tag: it reads well at any width, tables do not."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block]
    return [line for row in rows[2:] for line in (".TP", _bold(row[0]), _cells(rows[0], row))]


def _cells(head: list[str], row: list[str]) -> str:
    pairs = list(zip(head[1:], row[1:], strict=True))
    if len(pairs) == 1:
        return _inline(pairs[0][1])
    return _inline("; ".join(f"{name}: {cell}" if name else cell for name, cell in pairs if cell))


def _inline(text: str) -> str:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    parts = re.split(r"(`[^`]+`|\*\*[^*]+\*\*)", text)
    return _guard("".join(_bold(part) if part.startswith(("`", "**")) else _plain(part) for part in parts))


def _bold(text: str) -> str:
    return rf"\fB{_plain(text.strip('`*'))}\fR"
