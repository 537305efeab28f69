"""Queued updates of index rows. A read applies them to the text that the database has.

Lives here: which updates of a row the database has, and how a transaction applies them. Must not
know: the meaning of a row, threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from mirror.store.rows import Tables

Update: TypeAlias = Callable[[str | None], str | None]
"""Returns the new text of a row, or None to delete it. Gets its text, or None if it is missing."""


@dataclass(slots=True, eq=False)
class PendingRow:
    """Updates of one row. The text in the database may have some of them, and lack others."""

    queued: tuple[Update, ...] = ()
    """Updates whose transactions have not ended. Set by the loop only."""
    applied: tuple[tuple[Update, ...], str | None] = (), None
    """(updates that were applied in a transaction, the text after the last one). Set by the writing
    thread only."""

    def apply(self, update: Update, text: str | None) -> str | None:
        """Return the new text. ``text`` is that of the row, in the transaction."""
        new = update(text)
        self.applied = (*filter(self.queued.__contains__, self.applied[0]), update), new
        return new

    def read(self, tables: Tables, table: str, key: str) -> str | None:
        """Return the text with each update applied once.

        Args:
            tables: The open tables, in the reading thread.
            table: The table of the row.
            key: Its key.
        """
        while True:
            queued, latest = self.queued, self.applied
            applied, new = latest
            # While its transaction ends, the database may have the text before it or after it.
            text = new if applied and applied[-1] in queued else tables.read(table, key)[0]
            if self.queued is queued and self.applied is latest:
                return apply_updates((update for update in queued if update not in applied), text)


def apply_updates(updates: Iterable[Update], text: str | None) -> str | None:
    """Return the text of a row after updates."""
    for update in updates:
        text = update(text)
    return text


def write_updates(
    table: str,
    due: Iterable[tuple[str, PendingRow, Update]],
    ttl: float | None,
    tables: Tables,
) -> list[str | None]:
    """Update rows. Returns their earlier texts."""
    earlier = []
    for key, row, update in due:
        text, mark = tables.read_or_none(table, key)
        earlier.append(text)
        new = row.apply(update, text)
        if new is None:
            tables.delete(table, key)
        elif ttl is not None or (new, None) != (text, mark):
            tables.write(table, key, new, ttl=ttl)
    return earlier
