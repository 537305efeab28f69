"""Delete the orphaned rows of the index, a few at a time.

Lives here: the reads and transactions that check the rows about content. Must not know: which rows
are orphaned (:mod:`mirror.store.orphans`), when checks are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from mirror.oci.reference import Digest
from mirror.store.names import ACCESS, NAMED, UNBOUND_KEYS
from mirror.store.orphans import RowAction, RowChecks, digests_of, next_row_action
from mirror.store.records import parse_time
from mirror.store.rows import Row, Rows, Tables


class OrphanedRows:
    """Checks the rows about content, pass after pass."""

    def __init__(self, rows: Rows, now: Callable[[], float]) -> None:
        """Check nothing yet. ``now``: seconds since the epoch."""
        self._rows = rows
        self._now = now
        self._checks = {table: RowChecks() for table in (NAMED, ACCESS)}

    async def drop(self, is_on_disk: Callable[[Digest], bool], contents: int = 0) -> None:
        """Check the next rows of both tables about content, and delete the outdated ones.

        Repeated calls go through all rows, again and again.

        Args:
            is_on_disk: Whether content is on the disk.
            contents: Number of contents on the disk. It bounds the number of rows.
        """
        for table, checks in self._checks.items():
            checks.begin_call()
            for _ in range(checks.steps):
                if checks.is_due_for_count:
                    count = await self._rows.read(partial(Tables.count, table=table), 0)
                    checks.start(count, contents)
                await self._check_page(table, checks, is_on_disk)

    async def _check_page(
        self, table: str, checks: RowChecks, is_on_disk: Callable[[Digest], bool]
    ) -> None:
        now = self._now()

        def next_action(row: Row) -> RowAction:
            if row.key in UNBOUND_KEYS:
                return RowAction.KEEP
            is_present = any(map(is_on_disk, digests_of(row.key, row.text)))
            return next_row_action(
                is_present, parse_time(row.mark), now, checks.is_surplus(is_present)
            )

        def find(tables: Tables) -> tuple[int | None, list[Row]]:
            page = tables.read_page(table, checks.after)
            due = [row for row in page if next_action(row) is not RowAction.KEEP]
            return (page[-1].id if page else None), due

        def change(due: list[Row], tables: Tables) -> None:
            for row in due:
                # Another process may have written the row since: decide again in the transaction.
                text, mark = tables.read(table, row.key)
                if text is None:
                    continue
                action = next_action(replace(row, text=text, mark=mark))
                checks.count_action(action)
                match action:
                    case RowAction.MARK:
                        tables.write(table, row.key, text, mark=repr(now))
                    case RowAction.CLEAR:
                        tables.write(table, row.key, text)
                    case RowAction.DROP:
                        tables.delete(table, row.key)

        unanswered: tuple[int | None, list[Row]] = checks.after, []
        after, due = await self._rows.read(find, unanswered)
        if due:
            await self._rows.write(table, partial(change, due), None)
        checks.advance(after)
