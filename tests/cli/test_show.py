"""What is printed: foreign text is text, and only a terminal is given a width."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from scratch import clean_env

from mla_patch.cli import show

NASTY = {
    "markup": ("[/on][bold]x[/]", "[/on][bold]x[/]"),
    "emoji": (":smile:", ":smile:"),
    "escape": ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
    "lines": ("a\nb\r\tc\u2028d", "a\\nb\\r\\tc\\u2028d"),
    "direction": ("\u202eon\x9b31m", "\\u202eon\\x9b31m"),
    "not UTF-8": (os.fsdecode(b"\xff\xfe"), "\\udcff\\udcfe"),
    "accents": ("é × 5", "é × 5"),
    "nothing": (None, ""),
    "huge": ("x" * 5000, "x" * show.LONGEST + "... (1000 more characters)"),
}


@pytest.mark.parametrize(("value", "shown"), NASTY.values(), ids=NASTY)
def test_foreign_text_is_text(value: Any, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show.plain(value) == shown
    show.lines([value])
    show.table(value or "", ["state", "reason"], [{"state": value, "reason": value}])
    out = capsys.readouterr().out
    assert shown in out and not {c for c in out if c != "\n" and not c.isprintable()}


def test_on_a_terminal_too() -> None:
    """A terminal gets colours of ours, and no sequence of anybody else's."""
    code = (
        "from mla_patch.cli import show\n"
        "for text in ('[/on]', 'a\\x1b[2Jb', ':smile:'):\n"
        "    show.show(show.Line(text, 'green', text), show.Table(text, ['state'], [{'state': text}]))"
    )
    master, slave = pty.openpty()
    environ = clean_env({"TERM": "xterm-256color", "COLUMNS": "60", "NO_COLOR": None})
    child = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=subprocess.PIPE, env=environ)
    os.close(slave)
    out = b""
    with open(master, "rb", 0) as terminal:
        try:
            while piece := terminal.read(4096):
                out += piece
        except OSError:  # how Linux tells the end of a terminal
            pass
    assert child.stderr is not None and (child.wait(), child.stderr.read()) == (0, b"")
    assert b"[/on]" in out and b":smile:" in out and b"a\\x1b[2Jb" in out
    assert b"\x1b[2J" not in out and b"\x1b[32m" in out


def test_no_padding_and_no_folding_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "word " * 100
    rows = [{"name": "decode", "reason": reason, "served": 3}, {"name": "kv_indices", "reason": "", "served": None}]
    show.show(show.Line(reason), show.Table("title", ["name", "reason", "served"], rows))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == reason.rstrip() and lines[1] == "title"
    assert all(line == line.rstrip() for line in lines)
    assert lines[3].split() == ["decode", *reason.split(), "3"]
    assert lines[2].index("reason") == lines[3].index("word")
    assert lines[4] == "  kv_indices" and lines[5] == "" and len(lines) == 6


def test_json_is_what_every_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    show.as_json({"a": [float("nan"), (float("inf"), 1.5)], "b": "\x1b\udcff", "c": True})
    assert out.getvalue().isascii() and "\x1b" not in out.getvalue()
    told = json.loads(out.getvalue(), parse_constant=lambda text: pytest.fail(text))
    assert told == {"a": [None, [None, 1.5]], "b": "\x1b\udcff", "c": True}
