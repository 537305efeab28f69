"""The form of ``marks.json``: one JSON document, with one line for each mark.

Lives here: how the lines are written and read. Must not know: what a mark is, where the file is.

The file is read in short steps, so that no request waits for it, and an operator can read it. It
may also have been written by another program, as one JSON document of any form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, Final, TypeAlias

from mirror.store.pace import Pace
from mirror.store.records import MALFORMED

Entry: TypeAlias = dict[str, Any]
"""One mark, or some leases, as JSON."""

_VERSION: Final = 1
"""Version of the form. A file with another one is not read: it may have other kinds of marks."""
_OPENING_LINE: Final = f'{{"version": {_VERSION}, "marks": ['
_LAST_LINE: Final = "]}"


def dump_entries(entries: Iterable[Entry]) -> Iterator[str]:
    """Return the lines of a file with these marks."""
    yield _OPENING_LINE
    separator = "\n"
    for entry in entries:
        yield separator + json.dumps(entry)
        separator = ",\n"
    yield f"\n{_LAST_LINE}\n"


def load_entries(file: IO[str]) -> Iterator[Entry]:
    """Return the marks of a file, step by step. A damaged file has given those before the damage.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged. The text says where.
    """
    first = file.readline()
    pace = Pace()
    if first != f"{_OPENING_LINE}\n":
        yield from _load_whole(first + file.read())
        return
    number, line, is_ended = 1, "", False
    for number, line in enumerate(file, start=2):
        if is_ended:
            raise ValueError(f"line {number} follows its end")
        is_ended = line == f"{_LAST_LINE}\n"
        text = line.rstrip("\n").removesuffix(",")
        if not is_ended and text:
            pace.keep()
            yield _parse(text, f"line {number}")
    if not is_ended:
        raise ValueError(f"it ends early, at line {number}")


def _load_whole(text: str) -> list[Entry]:
    """Parse a file that another program has written."""
    document = _parse(text, "the whole file")
    if document.get("version") != _VERSION:
        raise ValueError(f"its version is not {_VERSION}")
    entries = document.get("marks")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("it has no list of marks")
    return entries


def _parse(text: str, where: str) -> Entry:
    try:
        entry = json.loads(text)
    except MALFORMED:
        raise ValueError(f"{where} is no JSON") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no JSON object")
    return entry
