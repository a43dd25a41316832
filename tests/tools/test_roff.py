# SPDX-License-Identifier: Apache-2.0
"""No text of the guide can turn into a command of the formatter, and nothing of it gets lost."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.roff import escape, from_markdown


def test_the_marks_of_the_guide_become_roff() -> None:
    text = "# Title\n\nSee [the map](map.md) or `--since`.\n\n* one\n  more\n* two\n\n```\n.so x\n\ny\n```\n"
    assert from_markdown(text).splitlines() == [
        ".PP", r"\fBTitle\fR",
        ".PP", r"See the map or \fB\-\-since\fR.",
        r".IP \(bu 2", "one more", r".IP \(bu 2", "two",
        ".PP", ".RS 4", ".EX", r"\&.so x", "", "y", ".EE", ".RE",
    ]  # fmt: skip


def test_a_table_becomes_a_list_with_its_headings_as_labels() -> None:
    text = "| setting | default | meaning |\n|---|---|---|\n| `a_b` | 16 | the unit |\n"
    assert from_markdown(text).splitlines() == [".TP", r"\fBa_b\fR", "default: 16; meaning: the unit"]


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"])))
def test_escaped_text_is_never_a_command(text: str) -> None:
    assert not escape(text).startswith((".", "'"))


@pytest.mark.tool("groff")
@settings(max_examples=20)
@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=1))
def test_words_come_out_of_the_formatter_as_they_went_in(words: list[str]) -> None:
    page = '.TH T 1\n.nh\n.ad l\n.PP\n' + "\n".join(escape(word) for word in words) + "\n"
    result = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-c", "-P-b", "-P-u", "-rLL=10000n"], input=page, capture_output=True, text=True
    )
    assert result.stderr == ""
    assert " ".join(words) in " ".join(result.stdout.split())
