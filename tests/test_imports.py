# SPDX-License-Identifier: Apache-2.0
"""Imports go one way between the rooms, and a command that prints its help loads nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "stasis"

# docs/design/architecture.md, "Rooms and who imports whom": a room may import those of smaller rank.
# `errors` and `units` lie at the bottom, and the package itself (the public calls) sees the daemon's client.
RANKS = {
    "errors": 0,
    "units": 1,
    "linux": 2,
    "nbd": 3,
    "block": 4,
    "backup": 5,
    "live": 5,
    "datto": 5,
    "blksnap": 5,
    "process": 5,
    "daemon": 6,
    "": 7,
    "cli": 8,
    "__main__": 9,
}
HEAVY = {
    *("asyncio", "blake3", "cryptography", "ctypes.util", "http.client", "obstore", "shtab", "ssl", "tqdm"),
    *("unittest", "varlink", "zstandard"),
}

FILES = sorted(PACKAGE.rglob("*.py"))


def _room(module: str) -> str:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return name if name in RANKS else ""


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every stasis module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("stasis"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "stasis":
                yield from ((node.lineno, f"stasis.{alias.name}") for alias in node.names)
            elif node.module and node.module.startswith("stasis."):
                yield node.lineno, node.module


def _module(path: Path) -> str:
    parts = ["stasis", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = _room(_module(path))
    wrong = [
        f"line {line}: {room or 'stasis'} imports {name}"
        for line, name in _imports(path)
        if name != "stasis.__version__" and name != "stasis" and RANKS[_room(name)] > RANKS[room]
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_uses_private_names_of_another(path: Path) -> None:
    tree = ast.parse(path.read_text())
    wrong = [
        f"line {node.lineno}: {node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stasis.")
        for alias in node.names
        if alias.name.startswith("_") and _room(node.module or "") != _room(_module(path))
    ]
    assert not wrong


@pytest.mark.parametrize("arguments", [["--help"], ["snapshot", "copy", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stasis", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "stasis.cli.main" in loaded
    assert not loaded & HEAVY
