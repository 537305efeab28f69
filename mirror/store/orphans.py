"""Orphaned rows of the index: rows about content that left the disk long ago.

Lives here: the pure decision about one row, which content a row is about, how many rows there may
be. Must not know: where rows are kept, or how the caller finds out which content is on disk.

A row about content that is on disk is not deleted, whatever the clock does. A mirror without a
network could not ask the upstream again for the tags of the content, nor for the repositories that
may read it. But no quota counts the rows, so their number is bounded by that of the contents. If
there are more, orphaned rows are deleted first, the oldest ones first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest
from mirror.store.records import load_access_record, load_tag

ORPHAN_ROW_TTL_S: Final = 90 * 86400.0
"""Seconds to keep a row after its content has left the disk, unless it is written again. 90 days:
an image that returns after a long outage of its upstream is still known."""
_ROWS_PER_CONTENT: Final = 20
"""Rows of one table for each content on the disk. A content of an image has 2 to 6 of them. One of
an image for many platforms has up to 15, because each platform has rows, and few are pulled."""
_MIN_ROWS: Final = 10_000
"""Rows of one table that are always allowed: 7 MB."""
_CALLS_PER_PASS: Final = 720
"""Calls in which all rows of a table are checked once: an hour, if there is a call every 5 s."""
_CALLS_PER_COUNT: Final = 12
"""Calls after which the rows are counted again: a minute. Rows may be added faster than one step a
call checks them, and then a pass would take days. Counting 100,000 rows takes 5 ms."""
_ROWS_PER_STEP: Final = 50
"""Rows that one step checks."""
_SURPLUS_STEPS: Final = 20
"""Further steps of one call while there are too many rows: 1,000 rows every 5 s. A row is deleted
in the second pass, so passes of an hour would let the rows grow for two hours."""
VERIFIED_PREFIX: Final = "verified "
"""Prefix of the keys of verification times. The digest follows."""


class RowAction(Enum):
    """The change to make to a row."""

    KEEP = auto()
    """Change nothing."""
    MARK = auto()
    """Record that its content is missing from now on."""
    CLEAR = auto()
    """Remove that record: its content is on the disk again."""
    DROP = auto()
    """Delete the row."""


def next_row_action(
    is_present: bool, missing_since: float | None, now: float, is_surplus: bool = False
) -> RowAction:
    """Decide about one row.

    Args:
        is_present: Whether content of the row is on the disk.
        missing_since: When it was first found missing, in seconds since the epoch. None: it was
            present at the last check.
        now: The current time, in seconds since the epoch.
        is_surplus: Whether there are too many rows like this one. A row that is missing for the
            first time stays even then: its content may be on its way.
    """
    if is_surplus and (is_present or missing_since is not None):
        return RowAction.DROP
    if is_present:
        return RowAction.KEEP if missing_since is None else RowAction.CLEAR
    if missing_since is None or missing_since > now:  # The clock was set back: count from now.
        return RowAction.MARK
    return RowAction.DROP if now - missing_since > ORPHAN_ROW_TTL_S else RowAction.KEEP


@dataclass(slots=True)
class RowChecks:
    """The checks of the rows of one table, pass after pass."""

    after: int = 0
    """Row id after which the next step begins."""
    _rows: int = 0
    """Number of rows when they were last counted."""
    _calls_since_count: int = 0
    _surplus: int = 0
    """Number of rows that are too many."""
    _has_marked: bool = False
    """Whether this pass has found orphaned rows that may be deleted in the next one."""
    _is_in_vain: bool = False
    """Whether there were too many rows after a pass, although it left no orphaned ones."""

    @property
    def steps(self) -> int:
        """Steps of one call."""
        further = _SURPLUS_STEPS if self._surplus else 0
        return 1 + further + self._rows // (_CALLS_PER_PASS * _ROWS_PER_STEP)

    @property
    def is_due_for_count(self) -> bool:
        """Whether the rows must be counted before the next step: once in a call at most.

        Between counts, other processes may have deleted rows as well.
        """
        is_old = self._calls_since_count >= (1 if self._surplus > 0 else _CALLS_PER_COUNT)
        return is_old or (self.after == 0 and self._calls_since_count > 0)

    def begin_call(self) -> None:
        """Begin a call, which does :attr:`steps` steps."""
        self._calls_since_count += 1

    def start(self, rows: int, contents: int) -> None:
        """Use a new count of the rows, and the number of contents on the disk."""
        self._rows, self._calls_since_count = rows, 0
        self._surplus = max(0, rows - _MIN_ROWS - _ROWS_PER_CONTENT * contents)

    def is_surplus(self, is_present: bool) -> bool:
        """Return whether there are too many rows. Rows of present content are deleted last."""
        return self._surplus > 0 and (not is_present or self._is_in_vain)

    def count_action(self, action: RowAction) -> None:
        """Count a change that was made to a row."""
        if action is RowAction.DROP:
            self._surplus -= 1
        self._has_marked = self._has_marked or action is RowAction.MARK

    def advance(self, after: int | None) -> None:
        """End a step. ``after``: row id of its last row; None if there were no more rows."""
        if after is None:
            self._is_in_vain = self._surplus > 0 and not self._has_marked
            self._has_marked = False
        self.after = after or 0


def digests_of(key: str, text: str) -> frozenset[Digest]:
    """Return the content that a row is about. Any of it keeps the row.

    A tag's record is also about the earlier digests of the tag. Empty for a malformed row.
    """
    if key.startswith(VERIFIED_PREFIX):
        try:
            return frozenset({Digest.parse(key.removeprefix(VERIFIED_PREFIX))})
        except InvalidRequest:
            return frozenset()
    record, access_record = load_tag(text), load_access_record(text)
    if record is not None:
        return frozenset(record.digests)
    return frozenset() if access_record is None else frozenset({access_record.digest})
