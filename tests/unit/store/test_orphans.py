"""Orphaned rows: a row goes only after its content has been missing for 90 days."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.orphans import (
    ORPHAN_ROW_TTL_S,
    VERIFIED_PREFIX,
    RowAction,
    digests_of,
    next_row_action,
)
from mirror.store.records import AccessRecord, confirm, dump_access_record, dump_tag

REPO, TAG = Repository("docker.io", "library/app"), Tag("1.0")
ONE, TWO = Digest.of(b"one"), Digest.of(b"two", "sha512")
TIMES = st.floats(-1e12, 1e12)


@pytest.mark.row("K1-wrong-clock")
@given(st.none() | TIMES, TIMES)
def test_row_about_content_on_disk_stays_at_any_time(
    missing_since: float | None, now: float
) -> None:
    assert next_row_action(True, missing_since, now) is (
        RowAction.KEEP if missing_since is None else RowAction.CLEAR
    )


@given(st.none() | TIMES, TIMES)
def test_row_about_missing_content_is_marked_and_dropped_after_90_days(
    missing_since: float | None, now: float
) -> None:
    state = next_row_action(False, missing_since, now)
    assert (state is RowAction.MARK) == (missing_since is None or missing_since > now)
    assert (state is RowAction.DROP) == (
        missing_since is not None and now - missing_since > ORPHAN_ROW_TTL_S
    )


@given(st.lists(st.tuples(st.booleans(), TIMES), max_size=20))
def test_row_is_dropped_only_after_two_checks_that_miss_its_content(
    looks: list[tuple[bool, float]],
) -> None:
    """The clock may do anything in between."""
    mark: float | None = None
    missing_in_a_row = 0
    for present, now in looks:
        missing_in_a_row = 0 if present else missing_in_a_row + 1
        match next_row_action(present, mark, now):
            case RowAction.MARK:
                mark = now
            case RowAction.CLEAR:
                mark = None
            case RowAction.DROP:
                assert missing_in_a_row >= 2
                return


def test_digests_of_names_all_content_of_a_row() -> None:
    record = confirm(confirm(None, REPO, TAG, ONE, 1.0), REPO, TAG, TWO, 2.0)
    assert digests_of(f"{REPO}:{TAG}", dump_tag(record)) == {ONE, TWO}, "also by an earlier digest"
    access_record = AccessRecord(
        digest=TWO, kind="blob", media_type="a/b", size=3, referrer=ONE, expires_at=None
    )
    assert digests_of(f"{REPO}@{TWO}", dump_access_record(access_record)) == {TWO}
    assert digests_of(f"{VERIFIED_PREFIX}{TWO}", "1.0") == {TWO}


@pytest.mark.parametrize("key", ["x", f"{VERIFIED_PREFIX}x", f"{VERIFIED_PREFIX}sha256:abc"])
def test_malformed_row_is_about_no_content(key: str) -> None:
    assert digests_of(key, "garbage") == frozenset()
