"""Tables of the listing commands: for a terminal, for other programs, and as JSON.

Lives here: the three forms of the same rows. Must not know: what is listed.

A row is a mapping of JSON values, by key: times are RFC 3339 text in UTC, sizes bytes, durations
seconds. ``--json`` prints it as it is. A :class:`Column` says how a person reads one value of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias

from mirror.cli.output import print_line
from mirror.oci.text import age_text, printable

Values: TypeAlias = Mapping[str, Any]
"""Key -> JSON value: one row of a listing."""

_MAX_CELL_CHARS: Final = 400
"""Characters of a cell: the longest image name has 255, and a tag 128."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, the key of its values in a row, and their text."""

    title: str
    key: str
    render: Callable[[Any], str] = str
    is_number: bool = False
    """Whether the text is aligned at the right."""


def print_rows(columns: Sequence[Column], rows: Iterable[Values], *, is_json: bool) -> None:
    """Print rows. An empty table has its titles only, and an empty JSON listing no line.

    Raises :class:`mirror.cli.output.OutputError`.
    """
    if is_json:
        for row in rows:
            print_line(json.dumps(row))
        return
    rows = list(rows)
    texts = [_texts(column, rows) for column in columns]
    if is_terminal():
        _print_table(columns, zip(*texts, strict=True))
        return
    padded = []
    for column, cells in zip(columns, texts, strict=True):
        cells = [column.title, *cells]
        width = max(map(len, cells))
        pad = str.rjust if column.is_number else str.ljust
        padded.append([pad(cell, width) for cell in cells])
    for line in zip(*padded, strict=True):
        print_line("  ".join(line).rstrip())


def is_terminal() -> bool:
    """Return whether a person reads the standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


def _texts(column: Column, rows: Iterable[Values]) -> list[str]:
    """Return the texts of a column. A whole column at once: a listing has 100,000 cells."""
    key, render = column.key, column.render
    texts = ["-" if (value := row.get(key)) is None else render(value) for row in rows]
    joined = "".join(texts)
    if (
        joined.isascii()
        and joined.isprintable()
        and len(max(texts, key=len, default="")) <= _MAX_CELL_CHARS
    ):
        return texts  # Nothing to escape, as nearly always.
    return [printable(text, _MAX_CELL_CHARS) for text in texts]


def _print_table(columns: Sequence[Column], lines: Iterable[Sequence[str]]) -> None:
    # Imported here: a table on a terminal is the only thing that needs it.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for line in lines:
        table.add_row(*(Text(text) for text in line))  # Text: a cell is no markup.
    Console().print(table)


# --- values ---------------------------------------------------------------------------------------


def since_text(now: float) -> Callable[[str], str]:
    """Return a ``render`` of RFC 3339 text as ``3 d ago``. ``now``: Unix time in seconds."""

    def render(text: str) -> str:
        return f"{age_text(now - datetime.fromisoformat(text).timestamp())} ago"

    return render


def short_digest(text: str) -> str:
    """Return the algorithm and the first 12 hexadecimal digits, as Docker prints a digest."""
    algorithm, _, digits = text.partition(":")
    return f"{algorithm}:{digits[:12]}"
