"""Orphaned rows of the index: rows about content that left the disk long ago.

Lives here: the pure decision about one row, and which content a row is about. Must not know: where
rows are kept, or how the caller finds out which content is on disk.

A row about content that is on disk is never deleted, whatever the clock does. A mirror without a
network could not ask the upstream again for the tags of the content, nor for the repositories that
may read it.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest
from mirror.store.records import load_access_record, load_tag

ORPHAN_ROW_TTL_S: Final = 90 * 86400.0
"""Seconds to keep a row after its content has left the disk, unless it is written again. 90 days:
an image that returns after a long outage of its upstream is still known."""
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


def next_row_action(is_present: bool, missing_since: float | None, now: float) -> RowAction:
    """Decide about one row.

    Args:
        is_present: Whether content of the row is on the disk.
        missing_since: When it was first found missing, in seconds since the epoch. None: it was
            present at the last check.
        now: The current time, in seconds since the epoch.
    """
    if is_present:
        return RowAction.KEEP if missing_since is None else RowAction.CLEAR
    if missing_since is None or missing_since > now:  # The clock was set back: count from now.
        return RowAction.MARK
    return RowAction.DROP if now - missing_since > ORPHAN_ROW_TTL_S else RowAction.KEEP


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
