"""Tables of the listing commands: for a terminal, for other programs, and as JSON.

Lives here: the three forms of the same rows. Must not know: what is listed, how wide a column is
(:mod:`mirror.cli.table_layout`).

A row is a mapping of JSON values, by key: times are RFC 3339 text in UTC, sizes bytes, durations
seconds. ``--json`` prints it as it is. A
:class:`~mirror.cli.table_layout.Column` says how a person reads one value of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Any, Final, TypeAlias

from mirror.cli.output import print_line
from mirror.cli.table_layout import (
    GAP,
    Column,
    choose_layout,
    familiar_names,
    short_digests,
    wrap,
)
from mirror.oci.text import age_text, printable

Values: TypeAlias = Mapping[str, Any]
"""Key -> JSON value: one row of a listing."""

_MAX_CELL_CHARS: Final = 400
"""Characters of a cell: the longest image name has 255, and a tag 128."""

_ROWS_OF_PAGE: Final = 4096
"""Rows that are in memory together, as values. Of all others, there are only the texts."""
_CELL_END: Final = "\0"
"""Ends a cell. No cell has it: it is escaped."""


def print_rows(
    columns: Sequence[Column],
    rows: Iterable[Values],
    *,
    is_json: bool,
    narrower: Sequence[Sequence[Column]] = (),
    is_whole: bool = False,
) -> None:
    """Print rows. An empty table has its titles only, and an empty JSON listing no line.

    Args:
        columns: All columns.
        rows: The rows.
        is_json: Print them as JSON.
        narrower: Columns for terminals on which ``columns`` do not fit, from the widest to the
            narrowest set.
        is_whole: Do not shorten the digests in texts on a terminal.

    Raises :class:`mirror.cli.output.OutputError`.
    """
    if is_json:
        for row in rows:
            print_line(json.dumps(row))
        return
    if is_terminal():
        _print_table((columns, *narrower), list(rows), is_whole=is_whole)
    else:
        _print_padded(columns, rows)


def _print_padded(columns: Sequence[Column], rows: Iterable[Values]) -> None:
    """Print all rows, padded to the widest cell of each column. Only their texts are kept."""
    widths = [len(column.title) for column in columns]
    pages: list[list[bytes]] = []
    rows = iter(rows)
    while page := list(islice(rows, _ROWS_OF_PAGE)):
        kept = []
        for number, column in enumerate(columns):
            cells = _texts(column.render, column.key, page)
            widths[number] = max(widths[number], len(max(cells, key=len)))
            kept.append(_CELL_END.join(cells).encode())
        pages.append(kept)
    _print_lines(columns, widths, [[column.title] for column in columns])
    for kept in pages:
        _print_lines(columns, widths, [cells.decode().split(_CELL_END) for cells in kept])


def _print_lines(
    columns: Sequence[Column], widths: Sequence[int], cells: Sequence[Sequence[str]]
) -> None:
    """Print some lines. ``cells``: those of each column."""
    padded = []
    for column, width, texts in zip(columns, widths, cells, strict=True):
        pad = str.rjust if column.is_number else str.ljust
        padded.append([pad(text, width) for text in texts])
    print_line("\n".join([GAP.join(line).rstrip() for line in zip(*padded, strict=True)]))


def print_text(
    text: str, *, indent: int = 0, is_whole: bool = False, paint: Callable[[str], str] = str
) -> None:
    """Print a line. On a terminal, it is broken at blanks, and its digests have 12 digits.

    Args:
        text: The line, which may begin with blanks.
        indent: Blanks before the second line and all others, beside those before the first.
        is_whole: Do not shorten its digests.
        paint: Adds colours to the first line on a terminal.

    Raises :class:`mirror.cli.output.OutputError`.
    """
    if not is_terminal():
        print_line(text)
        return
    text = text if is_whole else short_digests(text)
    margin = " " * (len(text) - len(text.lstrip()))
    width = _terminal_width() - len(margin) - indent
    words = text.strip()
    # A longer word is printed as it is: it may be a command to copy.
    lines = wrap(words, max(width, *map(len, words.split(" "))), "")
    for number, line in enumerate(lines):
        line = f"{margin}{' ' * indent if number else ''}{line}".rstrip()
        print_line(line if number else paint(line))


def is_terminal() -> bool:
    """Return whether a person reads the standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns


def _texts(render: Callable[[Any], str], key: str, rows: Iterable[Values]) -> list[str]:
    """Return the texts of a column. A whole column at once: a listing has 100,000 cells."""
    texts = ["-" if (value := row.get(key)) is None else render(value) for row in rows]
    joined = "".join(texts)
    if (
        joined.isascii()
        and joined.isprintable()
        and len(max(texts, key=len, default="")) <= _MAX_CELL_CHARS
    ):
        return texts  # Nothing to escape, as nearly always.
    return [printable(text, _MAX_CELL_CHARS) for text in texts]


def _print_table(
    layouts: Sequence[Sequence[Column]], rows: Sequence[Values], *, is_whole: bool
) -> None:
    width, ellipsis = _terminal_width(), _ellipsis()
    layout = choose_layout(_with_texts(layouts, rows, is_whole=is_whole), width)
    titles, *lines = layout.lines(ellipsis)
    _print_titles(titles)
    for line in lines:
        print_line(line)


def _with_texts(
    layouts: Sequence[Sequence[Column]], rows: Sequence[Values], *, is_whole: bool
) -> Iterator[tuple[Sequence[Column], list[list[str]]]]:
    """Return the columns of each layout with their texts. The first one is not cut to fit."""
    known: dict[tuple[str, object], list[str]] = {}

    def texts_of(column: Column) -> list[str]:
        render = column.short or column.render
        if (column.key, render) not in known:
            texts = _texts(render, column.key, rows)
            known[column.key, render] = texts if is_whole else [*map(short_digests, texts)]
        return known[column.key, render]

    yield [replace(column, min_chars=0) for column in layouts[0]], [*map(texts_of, layouts[0])]
    for columns in layouts:
        texts = map(texts_of, columns)
        yield (
            columns,
            [
                [*map(familiar_names, cells)] if column.is_name else cells
                for column, cells in zip(columns, texts, strict=True)
            ],
        )


def _ellipsis() -> str:
    try:
        "…".encode(sys.stdout.encoding or "ascii")
    except UnicodeError:
        return "..."
    return "…"


def _print_titles(line: str) -> None:
    """Print the titles in bold, if the terminal has that."""
    # Imported here: a table on a terminal is the only thing that needs it.
    from rich.console import Console
    from rich.text import Text

    Console(soft_wrap=True).print(Text(line, style="bold"))


# --- values ---------------------------------------------------------------------------------------


def since_text(now: float) -> Callable[[str], str]:
    """Return a ``render`` of RFC 3339 text as ``3 d ago``. ``now``: Unix time in seconds."""

    def render(text: str) -> str:
        return f"{age_text(now - datetime.fromisoformat(text).timestamp())} ago"

    return render
