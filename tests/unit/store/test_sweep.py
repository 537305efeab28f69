"""The sweep: rows go when their content has been gone for long, and for no other reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.records import AccessRecord, confirm, dump_access_record, dump_tag
from mirror.store.sweep import KEPT, VERIFIED, RowState, digests_of, next_row_state

REPO, TAG = Repository("docker.io", "library/app"), Tag("1.0")
ONE, TWO = Digest.of(b"one"), Digest.of(b"two", "sha512")
TIMES = st.floats(-1e12, 1e12)


@pytest.mark.row("K1-wrong-clock")
@given(st.none() | TIMES, TIMES)
def test_what_is_on_disk_is_known_whatever_the_clock_says(missed: float | None, now: float) -> None:
    assert next_row_state(True, missed, now) is (
        RowState.KEEP if missed is None else RowState.CLEAR
    )


@given(st.none() | TIMES, TIMES)
def test_what_is_gone_is_first_marked_and_forgotten_long_after(
    missed: float | None, now: float
) -> None:
    fate = next_row_state(False, missed, now)
    assert (fate is RowState.MARK) == (missed is None or missed > now)
    assert (fate is RowState.DROP) == (missed is not None and now - missed > KEPT)


@given(st.lists(st.tuples(st.booleans(), TIMES), max_size=20))
def test_a_row_goes_only_after_two_looks_that_missed_its_content(
    looks: list[tuple[bool, float]],
) -> None:
    """Whatever the clock does in between."""
    mark: float | None = None
    missed_in_a_row = 0
    for present, now in looks:
        missed_in_a_row = 0 if present else missed_in_a_row + 1
        match next_row_state(present, mark, now):
            case RowState.MARK:
                mark = now
            case RowState.CLEAR:
                mark = None
            case RowState.DROP:
                assert missed_in_a_row >= 2
                return


def test_a_row_is_kept_by_the_content_that_it_is_about() -> None:
    record = confirm(confirm(None, REPO, TAG, ONE, 1.0), REPO, TAG, TWO, 2.0)
    assert digests_of(f"{REPO}:{TAG}", dump_tag(record)) == {ONE, TWO}, "and by what a tag was"
    member = AccessRecord(TWO, "blob", "a/b", 3, ONE, None)
    assert digests_of(f"{REPO}@{TWO}", dump_access_record(member)) == {TWO}
    assert digests_of(f"{VERIFIED}{TWO}", "1.0") == {TWO}


@pytest.mark.parametrize("key", ["x", f"{VERIFIED}x", f"{VERIFIED}sha256:abc"])
def test_garbage_is_about_no_content(key: str) -> None:
    assert digests_of(key, "garbage") == frozenset()
