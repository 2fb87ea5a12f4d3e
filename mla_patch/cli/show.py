"""What the command line prints for a person, and for a program.

Text that comes from a file, from the environment or from a plugin is shown as text: nothing in it is taken for markup,
and no control character of it reaches the terminal. On a terminal, tables are Rich's, folded to its width. Elsewhere a
line is as long as what it says: nothing is folded, and no line ends in blanks.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mla_patch.features import State

LONGEST = 4000  # characters of one value that are shown
_ALIGNED = 40  # characters to which a column is padded where there is no terminal; a longer cell shifts its row


@dataclass(frozen=True)
class Line:
    """One line, the ``head`` of it in bold."""

    text: str
    style: str = ""
    head: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a title; a row's values are found by the columns' names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]


def plain(value: Any) -> str:
    """The value as text that is safe to print: what is not printable is shown as its escape, None as nothing."""
    text = "" if value is None else str(value)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({len(text) - LONGEST} more characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def lines(texts: Iterable[str], style: str = "") -> None:
    show(*(Line(text, style) for text in texts))


def table(title: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    show(Table(title, columns, list(rows)))


def show(*blocks: Line | Table) -> None:
    """Print lines and tables."""
    if on_terminal():
        out = console()
        for block in blocks:
            # a terminal wraps a line itself, and then it can be copied whole
            out.print(_rich(block), soft_wrap=isinstance(block, Line))
        return
    for block in blocks:
        for line in [_line(block)] if isinstance(block, Line) else _table(block):
            print(line)


def keep_showing(look: Callable[[], Iterable[Line | Table]], every: float) -> None:
    """Show what ``look`` finds, anew every so many seconds: in one place on a terminal, else one below the other."""
    if not on_terminal():
        while True:
            show(*look())
            sys.stdout.flush()
            time.sleep(every)
    from rich.console import Group
    from rich.live import Live

    with Live(Group(*map(_rich, look())), console=console(), auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(Group(*map(_rich, look())), refresh=True)


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, stderr=stderr)


def complain(text: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        print(f"mla-patch: {plain(text)}", file=sys.stderr)


def as_json(value: Any) -> None:
    """Print JSON that every reader takes: ASCII, and null where a file held a number that JSON does not have."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=1)
    print(text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLOURS = {State.APPLIED: "green", State.ARMED: "green", State.NATIVE: "green", State.OFF: "dim", State.ABSENT: "dim"}


def _style(column: str, text: str) -> str:
    if column != "state":
        return ""
    return {str(state): colour for state, colour in _COLOURS.items()}.get(text, "red")


def _line(line: Line) -> str:
    return f"{plain(line.head)}{plain(line.text)}".rstrip()


def _rich(block: Line | Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    if isinstance(block, Line):
        return Text.assemble((plain(block.head), "bold"), (plain(block.text), block.style))
    made = RichTable(title=Text(plain(block.title)), title_justify="left", box=box.SIMPLE_HEAD)
    for column in block.columns:
        made.add_column(Text(_title(column)), overflow="fold")
    for row in block.rows:
        cells = [(column, plain(row.get(column))) for column in block.columns]
        made.add_row(*(Text(text, _style(column, text)) for column, text in cells))
    return made


def _table(block: Table) -> Iterable[str]:
    """The table's lines: columns stand below each other as far as that takes no more than a few blanks."""
    rows = [list(map(_title, block.columns))]
    rows += [[plain(row.get(column)) for column in block.columns] for row in block.rows]
    widths = [min(max(map(len, cells)), _ALIGNED) for cells in zip(*rows, strict=True)]
    yield plain(block.title)
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""


def _title(column: str) -> str:
    return column.replace("_", " ")
