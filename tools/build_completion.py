# SPDX-License-Identifier: Apache-2.0
"""Write the shell completions that packages install, as `stasis completion SHELL` prints them."""

from __future__ import annotations

import sys
from pathlib import Path

import shtab

from stasis.cli import main as stasis
from stasis.cli.blksnap import parser as blksnap

PARSERS = {"stasis": stasis.build_parser, "blksnap": blksnap.build_parser}
FILES = {"bash": "{}", "zsh": "_{}"}
"""Names under which bash-completion and zsh's fpath look."""


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: build_completion.py DIRECTORY", file=sys.stderr)
        return 2
    for shell, name in FILES.items():
        for command, build_parser in PARSERS.items():
            path = Path(sys.argv[1]) / shell / name.format(command)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shtab.complete(build_parser(), shell))
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
