"""Eviction: what goes, in which order, and what never does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mirror.config import Storage
from mirror.oci.digest import Digest
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


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**7))
def test_room_is_made_down_to_the_low_water_mark(
    size: int, reserved: int, need: int, free: int
) -> None:
    settings = Storage(max_size=1_000_000)
    usage = Usage(1, size, reserved)
    verdict = needed(usage, need, free, settings)
    if need > 950_000:
        assert verdict is None
    else:
        assert verdict is not None
        count, reason = verdict
        fits = usage.total <= 950_000 and need <= free
        assert (count == 0) == fits
        if not fits:
            assert reason in ("quota", "disk")
            assert need <= free + count
            assert usage.total <= 950_000 or usage.total - count <= 850_000
