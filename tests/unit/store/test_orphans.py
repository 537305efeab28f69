"""Orphaned rows: a row goes only after its content has been missing for 90 days."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.orphans import (
    _CALLS_PER_PASS,
    _MIN_ROWS,
    _ROWS_PER_CONTENT,
    _ROWS_PER_STEP,
    ORPHAN_ROW_TTL_S,
    VERIFIED_PREFIX,
    RowAction,
    RowChecks,
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


# --- too many rows --------------------------------------------------------------------------------


@pytest.mark.row("G4-busy-index")
@pytest.mark.parametrize(
    ("is_present", "missing_since", "wanted"),
    [
        (False, None, RowAction.MARK),
        (False, 1.0, RowAction.DROP),
        (True, None, RowAction.DROP),
    ],
)
def test_surplus_row_is_deleted_unless_it_is_missing_for_the_first_time(
    is_present: bool, missing_since: float | None, wanted: RowAction
) -> None:
    assert next_row_action(is_present, missing_since, 2.0, is_surplus=True) is wanted


def test_orphaned_rows_are_surplus_first_and_others_after_a_pass_in_vain() -> None:
    checks = RowChecks()
    checks.start(rows=_MIN_ROWS + 2 * _ROWS_PER_CONTENT + 3, contents=2)
    assert checks.is_surplus(is_present=False)
    assert not checks.is_surplus(is_present=True)
    checks.count_action(RowAction.MARK)
    checks.advance(None)
    assert not checks.is_surplus(is_present=True), "the next pass can delete the marked row"
    checks.count_action(RowAction.DROP)
    checks.advance(None)
    assert checks.is_surplus(is_present=True), "two rows are still too many"
    checks.count_action(RowAction.DROP)
    checks.count_action(RowAction.DROP)
    assert not checks.is_surplus(is_present=True)
    assert not checks.is_surplus(is_present=False)
    checks.start(rows=_MIN_ROWS + 2 * _ROWS_PER_CONTENT, contents=2)
    assert not checks.is_surplus(is_present=False)


def test_all_rows_are_checked_within_an_hour() -> None:
    for rows in (0, 100, 100_000, 3_000_000):
        checks = RowChecks()
        checks.start(rows, contents=rows)
        assert checks.steps * 720 * 50 >= rows
        assert checks.steps <= 1 + rows / (720 * 50)


@pytest.mark.row("HC9-random-names")
def test_surplus_rows_are_deleted_within_ten_minutes() -> None:
    rows, calls, checks = 56_000, 0, RowChecks()
    marked: set[int] = set()
    kept = list(range(rows))
    while len(kept) > _MIN_ROWS and calls < _CALLS_PER_PASS:
        checks.begin_call()
        for _ in range(checks.steps):
            checks.start(len(kept), contents=0)
            page = [row for row in kept if row >= checks.after][:_ROWS_PER_STEP]
            for row in page:
                since = 1.0 if row in marked else None
                action = next_row_action(False, since, 2.0, checks.is_surplus(False))
                checks.count_action(action)
                if action is RowAction.DROP:
                    kept.remove(row)
                else:
                    marked.add(row)
            checks.advance(page[-1] + 1 if page else None)
        calls += 1
    assert calls * 5.0 < 600.0


@pytest.mark.row("HC9-random-names")
def test_rows_that_are_added_during_a_pass_are_checked_within_an_hour_as_well() -> None:
    """A client that pulls long manifests adds rows much faster than one step a call checks them."""
    checks, rows, calls = RowChecks(), 5_000, 0
    while checks.after < rows:
        checks.begin_call()
        for _ in range(checks.steps):
            if checks.is_due_for_count:
                checks.start(rows, contents=rows)
            checks.advance(min(checks.after + _ROWS_PER_STEP, rows))
        calls += 1
        rows = 1_000_000
    assert calls <= 1.1 * _CALLS_PER_PASS


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
