"""Eviction: what goes, in which order, and what never does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.config.settings import Storage
from mirror.oci.reference import Digest
from mirror.store.catalog import Entry, Usage
from mirror.store.eviction import needed, plan

DIGESTS = [Digest.of(bytes([n])) for n in range(12)]
ENTRIES = st.lists(
    st.builds(
        Entry, st.sampled_from(DIGESTS), st.integers(0, 1000), st.floats(0, 1e9, allow_nan=False)
    ),
    unique_by=lambda entry: entry.digest,
)


@given(
    ENTRIES,
    st.sets(st.sampled_from(DIGESTS)),
    st.dictionaries(st.sampled_from(DIGESTS), st.lists(st.sampled_from(DIGESTS))),
)
def test_pins_and_what_they_refer_to_never_go_and_the_rest_goes_by_age(
    entries: list[Entry], pinned: set[Digest], references: dict[Digest, list[Digest]]
) -> None:
    chosen = plan(entries, 10**9, pinned, references).candidates
    kept = set(pinned)
    while more := {d for k in kept for d in references.get(k, ()) if d not in kept}:
        kept |= more
    assert not {entry.digest for entry in chosen} & kept
    assert {entry.digest for entry in entries} - kept == {entry.digest for entry in chosen}
    assert [entry.used for entry in chosen] == sorted(entry.used for entry in chosen)


SETTINGS = Storage(max_size=1_000_000)
HIGH, LOW = 950_000, 850_000
SIZES = st.integers(0, 1_000_000)


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 10**7))
def test_room_is_made_down_to_the_low_water_mark(
    size: int, reserved: int, left: int, need: int, free: int
) -> None:
    usage = Usage(1, size, reserved, unwritten=reserved, left=left)
    verdict = needed(usage, need, free, SETTINGS)
    assert (verdict is None) == (need > HIGH or reserved > HIGH)
    if verdict is None:
        return
    count, reason = verdict
    fits = usage.total <= HIGH and max(need, reserved) <= free
    assert (count == 0) == (reason == "") == fits
    assert max(need, reserved) <= free + count
    assert usage.total <= HIGH or usage.total - count <= LOW
    if not fits:
        assert reason in ("quota", "disk")


@pytest.mark.parametrize(
    ("usage", "need", "free", "verdict"),
    [
        (Usage(1, HIGH, 0), 1, 10**7, (0, "")),
        (Usage(1, HIGH + 1, 0), 0, 10**7, (HIGH + 1 - LOW, "quota")),
        (Usage(1, 0, 0), HIGH, 10**7, (0, "")),
        (Usage(1, 0, 0), HIGH + 1, 10**7, None),
        (Usage(1, 0, HIGH + 1), 0, 10**7, None),
        (Usage(1, 0, 0), 500, 499, (1, "disk")),
        (Usage(1, 0, 700, unwritten=600), 500, 500, (100, "disk")),
        (Usage(1, HIGH, 1, left=100), 1, 0, (100_101, "quota")),
    ],
)
def test_the_marks_are_the_marks(
    usage: Usage, need: int, free: int, verdict: tuple[int, str] | None
) -> None:
    assert needed(usage, need, free, SETTINGS) == verdict
