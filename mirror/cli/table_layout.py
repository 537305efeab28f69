"""The layout of a table on a terminal: which columns are shown, and how wide each one is.

Lives here: columns, and lines that fit, as pure functions. Must not know: the terminal, how lines
are printed.

A table has several sets of columns, from the widest to the narrowest. The first set that fits is
shown. In it, names may be shortened in the middle, and sentences continue in the next line.
Digests, sizes, numbers and times are never cut, and never broken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

GAP: Final = "  "
"""Blanks between two columns."""
_DIGEST_CHARS: Final = 12
"""Hexadecimal digits of a digest that is shortened, as Docker prints it."""
_SHA256_CHARS: Final = 71
"""Characters of a whole digest: ``sha256:`` and 64 digits."""
_WHOLE_DIGEST: Final = re.compile(r"\b(sha256|sha512):([0-9a-f]{64,128})\b")
_BLANK: Final = re.compile(r" (?!(?:s|ms|min|h|d|%|ago)(?:[^\w]|$))")
"""Where a line may be broken: not between a number and its unit."""
_HUB_PREFIX: Final = re.compile(r"(?:^|(?<= ))docker\.io/(?:library/)?(?=[a-z0-9])")


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, the key of its values in a row, and their text."""

    title: str
    key: str
    render: Callable[[Any], str] = str
    is_number: bool = False
    """Whether the text is aligned at the right."""
    min_chars: int = 0
    """Characters that are left of a longer text on a narrow terminal. Zero: it is never cut."""
    is_name: bool = False
    """Whether it has image names. On a narrow terminal, those of Docker Hub are short ones."""
    is_sentence: bool = False
    """Whether a longer text continues in the next line. Otherwise it is shortened in the middle."""
    short: Callable[[Any], str] | None = None
    """The text on a terminal. None: that of :attr:`render`."""


def short_digests(text: str) -> str:
    """Return a text with the first 12 digits of each digest."""
    if len(text) == _SHA256_CHARS and text.startswith("sha256:"):
        return text[: 7 + _DIGEST_CHARS]  # A column of 10,000 digests is ten times as fast.
    return _WHOLE_DIGEST.sub(lambda match: f"{match[1]}:{match[2][:_DIGEST_CHARS]}", text)


def familiar_names(text: str) -> str:
    """Return a text whose names of Docker Hub are as users write them: ``nginx:1.27``."""
    return _HUB_PREFIX.sub("", text)


def shorten(text: str, width: int, ellipsis: str) -> str:
    """Return a text of at most ``width`` characters. The middle of a longer one is left out.

    Most of the end stays, where names differ, and all of a digest.
    """
    if len(text) <= width:
        return text
    left = max(width - len(ellipsis), 0)
    digest = len(text) - text.find("@") if "@" in text else 0
    tail = min(max(left - left // 3, digest), left)
    return (text[: left - tail] + ellipsis + text[len(text) - tail :])[:width]


def wrap(text: str, width: int, ellipsis: str) -> list[str]:
    """Return the lines of a text that is broken at blanks only. Longer words are shortened."""
    lines: list[str] = []
    for word in _BLANK.split(text):
        word = shorten(word, width, ellipsis)
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


@dataclass(frozen=True, slots=True)
class TableLayout:
    """Columns with their widths."""

    columns: Sequence[Column]
    cells: Sequence[Sequence[str]]
    """The texts of each column, without its title."""
    widths: Sequence[int]

    def lines(self, ellipsis: str) -> Iterable[str]:
        """Return the lines of the table. The first one has the titles."""
        yield self._line([column.title for column in self.columns])
        for row in zip(*self.cells, strict=True):
            if all(map(int.__le__, map(len, row), self.widths)):
                yield self._line(row)
                continue
            parts = [
                wrap(cell, width, ellipsis)
                if column.is_sentence
                else [shorten(cell, width, ellipsis) if column.min_chars else cell]
                for column, cell, width in zip(self.columns, row, self.widths, strict=True)
            ]
            for line in zip_longest(*parts, fillvalue=""):
                yield self._line(line)

    def _line(self, cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for column, cell, width in zip(self.columns, cells, self.widths, strict=True)
        ]
        return GAP.join(padded).rstrip()


def choose_layout(
    layouts: Iterable[tuple[Sequence[Column], Sequence[Sequence[str]]]], width: int
) -> TableLayout:
    """Return the first layout that fits, or else the last one, which is too wide then.

    Args:
        layouts: (columns, the texts of each column), one or more, from the widest to the narrowest.
        width: Characters of a line.
    """
    for columns, cells in layouts:
        found = _fit(columns, cells, width)
        if sum(found.widths) + len(GAP) * (len(columns) - 1) <= width:
            break
    return found


def _fit(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> TableLayout:
    """Return the columns with widths that fit, if they can."""
    widths = [
        max([len(column.title), *map(len, texts)])
        for column, texts in zip(columns, cells, strict=True)
    ]
    least = [
        min(wanted, max(column.min_chars, len(column.title))) if column.min_chars else wanted
        for column, wanted in zip(columns, widths, strict=True)
    ]
    excess = sum(widths) + len(GAP) * (len(columns) - 1) - width
    while excess > 0:
        room = [now - limit for now, limit in zip(widths, least, strict=True)]
        if not any(room):
            break
        # The widest one gives first, so that the widths of two long names become equal.
        widest = max(range(len(widths)), key=lambda n: (room[n] > 0, widths[n]))
        widths[widest] -= 1
        excess -= 1
    return TableLayout(columns, cells, widths)
