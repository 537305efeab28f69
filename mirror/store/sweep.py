"""Which rows of the index go: those about content that has been gone for long.

Lives here: the pure decision about one row, and which content a row is about. Must not know: where
rows are kept, or how one finds out what is on disk.

A row about content that is on disk never goes, whatever the clock does: what a mirror without a
network knows of its tags and of who may read what cannot be asked again.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from mirror.oci.errors import InvalidRequest
from mirror.oci.reference import Digest
from mirror.store.records import load_access_record, load_tag

KEPT: Final = 90 * 86400.0
"""Seconds after which a row goes whose content was gone, and that nobody wrote again."""
VERIFIED: Final = "verified "
"""What the keys of verification times begin with; the digest follows."""


class RowState(Enum):
    """What is to be done about a row."""

    KEEP = auto()
    """Nothing."""
    MARK = auto()
    """Note that its content is missed from now on."""
    CLEAR = auto()
    """Its content is back: forget that it was missed."""
    DROP = auto()
    """Forget the row."""


def next_row_state(present: bool, missed: float | None, now: float) -> RowState:
    """What becomes of a row whose content is ``present``, or is missed since ``missed``."""
    if present:
        return RowState.KEEP if missed is None else RowState.CLEAR
    if missed is None or missed > now:  # the clock was set back: count from here
        return RowState.MARK
    return RowState.DROP if now - missed > KEPT else RowState.KEEP


def digests_of(key: str, text: str) -> frozenset[Digest]:
    """The content that keeps a row; none for garbage. A tag's earlier digests keep its record."""
    if key.startswith(VERIFIED):
        try:
            return frozenset({Digest.parse(key.removeprefix(VERIFIED))})
        except InvalidRequest:
            return frozenset()
    record, member = load_tag(text), load_access_record(text)
    if record is not None:
        return frozenset(record.digests)
    return frozenset() if member is None else frozenset({member.digest})
