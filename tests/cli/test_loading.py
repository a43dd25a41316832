# SPDX-License-Identifier: Apache-2.0
"""A command that is loaded alone is the same command as among all others."""

from __future__ import annotations

import re

import pytest

from stasis.cli import backup, process
from stasis.cli.main import build_parser


@pytest.mark.parametrize(("group", "command"), [
    *(("backup", command) for command in backup.COMMANDS), *(("process", command) for command in process.COMMANDS),
])
def test_a_command_loaded_alone_has_the_same_help(group: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for words in ([], [group, command]):
        with pytest.raises(SystemExit) as ended:
            build_parser(words).parse_args([group, command, "--help"])
        assert ended.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_every_command_on_backups_is_loaded_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["backup", "--help"])
    listed = re.findall(r"^    ([a-z]+)", capsys.readouterr().out.partition("COMMAND\n")[2], re.MULTILINE)
    assert sorted(listed) == sorted(backup.COMMANDS)
