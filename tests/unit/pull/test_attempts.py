"""The rules after a transfer that broke: how the next one is requested, and when there is none."""

from __future__ import annotations

import pytest

from mirror.oci.errors import (
    AllCircuitsOpen,
    BlobUnknown,
    Denied,
    FailureScope,
    MirrorError,
    StorageRefused,
    Unauthorized,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Digest
from mirror.pull.attempts import SourceAttempts
from mirror.pull.requests import ContentSource
from tests.unit.pull.kit import MemoryRegistry, a_request

BROKEN = UpstreamUnavailable("broken")


def waiting(error: MirrorError, seconds: float = 0.0) -> MirrorError:
    """Return the error of a source whose endpoints may get no request."""
    error.next_request_in, error.is_wait = seconds, True
    return error


def limited(other: MirrorError) -> UpstreamRateLimited:
    """Return the error of two endpoints: one responded with 429, the other in another way."""
    error = UpstreamRateLimited("429")
    error.others = (other,)
    return error


def attempts(**changes: object) -> SourceAttempts:
    """Make the state of a source that has responded at the time 100."""
    source = ContentSource(MemoryRegistry(), a_request(Digest.of(b"a")))
    state = SourceAttempts(source, 45.0, last_progress_at=100.0, has_responded=True)
    for name, value in changes.items():
        setattr(state, name, value)
    return state


@pytest.mark.row("FB10-stalling-twice")
@pytest.mark.parametrize(
    ("changes", "now", "is_over"),
    [
        ({}, 100.0, False),
        ({}, 144.9, False),
        ({}, 145.0, True),
        ({"has_responded": False}, 100.0, True),
        ({"failed_in_a_row": 5}, 100.0, False),
        ({"failed_in_a_row": 6}, 100.0, True),
    ],
)
def test_source_is_given_up_after_5_failures_or_its_stall_limit(
    changes: dict[str, object], now: float, is_over: bool
) -> None:
    assert attempts(**changes).is_over(now) is is_over


@pytest.mark.row("U9-rate-limits")
def test_pause_is_waited_for_if_a_client_reads() -> None:
    paused = waiting(UpstreamRateLimited("a pause"), seconds=9.0)
    for has_responded in (True, False):
        state = attempts(has_responded=has_responded)
        for _ in range(9):
            state.count_failure(paused, 135.9, has_reader=True)
            assert (state.wait_s, state.failed_in_a_row) == (9.0, 0)
            assert not state.is_over(135.9)
        state.count_failure(paused, 136.0, has_reader=True)
        assert (state.wait_s, state.failed_in_a_row) == (None, 1), "it would end too late"
    state.count_failure(paused, 100.0)
    assert (state.wait_s, state.is_over(100.0)) == (None, True), "the client can go elsewhere"


@pytest.mark.row("U9-rate-limits")
def test_open_circuits_are_waited_for_after_the_first_response() -> None:
    state, error = attempts(), waiting(AllCircuitsOpen("not asked"))
    for _ in range(9):
        state.count_failure(error, 100.0)
        assert (state.wait_s, state.is_over(100.0)) == (0.0, False)
    assert state.is_over(145.0)


def test_source_without_a_response_is_repeated_only_if_it_is_the_last_one_of_a_client() -> None:
    state = attempts(has_responded=False)
    for count in range(6):
        state.count_failure(BROKEN, 100.0, has_reader=True)
        assert state.is_over(100.0)
        assert state.is_over(100.0, may_repeat=True) is (count == 5)


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize("refusal", [Denied("403"), BlobUnknown("404")])
def test_refusals_beside_a_pause_lead_to_one_request_without_a_range(refusal: MirrorError) -> None:
    refusal.endpoint = "http://refuses"
    error = waiting(limited(refusal), seconds=20.0)
    state = attempts(resumed_from=1)
    for _ in range(2):
        for may_use_range in (True, True, False):
            state.count_failure(error, 100.0, has_reader=True)
            assert (state.may_use_range, state.wait_s) == (may_use_range, None), "asked at once"
        state.count_failure(error, 100.0, has_reader=True)
        assert (state.may_use_range, state.wait_s) == (True, 20.0), "`Range` was not the cause"
    assert state.failed_in_a_row == 0


@pytest.mark.row("U9-rate-limits")
def test_endpoint_that_has_refused_the_whole_content_does_not_delay_the_wait_for_a_circuit() -> (
    None
):
    refusal = BlobUnknown("404")
    refusal.endpoint = "http://refuses"
    error = waiting(AllCircuitsOpen("not asked"))
    error.others = (refusal,)
    state = attempts(resumed_from=1)
    for _ in range(4):
        state.count_failure(error, 100.0)
    for _ in range(9):
        state.count_failure(error, 100.0)
        assert (state.may_use_range, state.wait_s) == (True, 0.0)
    refusal.endpoint = "http://another"
    state.count_failure(error, 100.0)
    assert state.wait_s is None, "it may be the cause of this one"


@pytest.mark.row("U9-rate-limits")
def test_wrong_range_beside_a_pause_leads_to_requests_without_a_range() -> None:
    wrong = UpstreamProtocolError("another range")
    error = waiting(limited(wrong), seconds=20.0)
    state = attempts(resumed_from=1)
    for may_use_range in (True, True, False, False, False):
        state.count_failure(error, 100.0, has_reader=True)
        assert state.may_use_range is may_use_range


def test_range_that_was_wrong_is_not_used_again_after_a_refusal_beside_a_pause() -> None:
    state = attempts(resumed_from=1)
    for error in (UpstreamProtocolError("another range"), *[limited(Denied("403"))] * 4):
        state.count_failure(error, 100.0)
        assert not state.may_use_range


@pytest.mark.row("U9-rate-limits")
def test_endpoint_that_pauses_is_waited_for_after_the_other_one_has_failed_often() -> None:
    state, error = attempts(), UpstreamUnavailable("500")
    error.next_request_in = 20.0
    for _ in range(5):
        state.count_failure(error, 100.0, has_reader=True)
        assert (state.wait_s, state.is_over(100.0)) == (None, False)
    for _ in range(5):
        state.count_failure(error, 100.0, has_reader=True)
        assert (state.wait_s, state.is_over(100.0)) == (20.0, False)
    state.count_failure(error, 125.0, has_reader=True)
    assert state.is_over(125.0), "the pause ends too late"
    error.next_request_in = 0.0
    state.count_failure(error, 100.0, has_reader=True)
    assert state.is_over(100.0), "an open circuit may stay open"


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(
    ("wait_s", "position", "ends_at"),
    [(None, 1000, 185.0), (20.0, 1001, 185.0), (20.0, 1000, 145.0)],
)
def test_time_of_other_sources_counts_only_while_nothing_comes_and_this_one_had_to_wait(
    wait_s: float | None, position: int, ends_at: float
) -> None:
    state = attempts(wait_s=wait_s)
    state.preempt(110.0, 1000)
    state.try_again(150.0, position)
    state.wait_s = None
    assert (state.is_over(ends_at - 0.1), state.is_over(ends_at)) == (False, True)


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(
    ("error", "least", "most"),
    [
        (BROKEN, 0.0, 0.1),
        (waiting(UpstreamRateLimited("a pause"), seconds=1.5), 1.5, 3.5),
        (waiting(AllCircuitsOpen("not asked")), 0.0, 2.0),
    ],
)
def test_pause_is_as_long_as_the_wait_and_a_random_time(
    error: MirrorError, least: float, most: float
) -> None:
    state = attempts()
    state.count_failure(error, 100.0, has_reader=True)
    pauses = [state.pause() for _ in range(300)]
    assert least <= min(pauses) < (least + most) / 2 < max(pauses) <= most


@pytest.mark.row("FB9-wrong-content-range-then-whole")
@pytest.mark.parametrize(
    ("errors", "may_use_range"),
    [
        ([BROKEN], True),
        ([BROKEN, UpstreamTimeout("late")], True),
        ([BROKEN] * 3, False),
        ([UpstreamProtocolError("another range")], False),
        ([waiting(AllCircuitsOpen("not asked"))] * 9, True),
        ([waiting(UpstreamRateLimited("a pause"))] * 9, True),
        ([UpstreamRateLimited("429")] * 4, True),
        ([UpstreamRateLimited("429")] * 5, False),  # The last try.
        ([BROKEN, BROKEN, UpstreamRateLimited("429")], True),
        ([limited(BROKEN)] * 3, False),
        ([limited(UpstreamRateLimited("429"))] * 4, True),
        ([limited(BlobUnknown("404"))] * 2, True),
        ([limited(BlobUnknown("404"))] * 3, False),
    ],
)
def test_range_is_left_out_after_a_wrong_response_or_three_failures(
    errors: list[MirrorError], may_use_range: bool
) -> None:
    state = attempts(resumed_from=1)
    for error in errors:
        state.count_failure(error, 100.0, has_reader=True)
    assert state.may_use_range is may_use_range


@pytest.mark.parametrize(
    "error",
    [
        UpstreamUnavailable("502", scope=FailureScope.SAME_KIND),
        UpstreamUnavailable("500", scope=FailureScope.REQUEST),
        UpstreamTimeout("silent", scope=FailureScope.SAME_KIND),
    ],
    ids=repr,
)
@pytest.mark.parametrize("is_reading", [False, True], ids=["response", "body"])
@pytest.mark.parametrize("is_ranged", [True, False], ids=["ranged", "other-endpoint"])
def test_range_is_kept_while_an_endpoint_fails_whose_ranges_have_brought_bytes(
    error: MirrorError, is_reading: bool, is_ranged: bool
) -> None:
    """Otherwise an outage of three seconds costs all bytes a second time.

    The endpoint may not be the one that was asked last, and that one may fail because of Range.
    """
    state = attempts(resumed_from=1)
    state.note_progress(100.0, 2000, ["http://one"] if is_ranged else ["http://two"])
    state.begin(2000, 100.0)
    state.has_transfer_response, error.endpoint = is_reading, "http://one"
    for beside_a_pause in (False, True) * 3:
        state.count_failure(limited(error) if beside_a_pause else error, 100.0, has_reader=True)
    assert state.may_use_range is is_ranged
    state.count_failure(UpstreamProtocolError("200"), 100.0)
    assert not state.may_use_range, "a wrong response tells about Range"


def test_range_is_kept_after_failures_that_have_another_cause() -> None:
    """Otherwise a token service that fails for a moment costs all bytes a second time."""
    state, without_token = attempts(resumed_from=1), UpstreamUnavailable("500")
    without_token.is_without_token = True
    unreachable = UpstreamUnavailable("no connection", scope=FailureScope.ENDPOINT)
    for error in (without_token, unreachable, BROKEN, BROKEN):
        state.count_failure(error, 100.0)
    assert state.may_use_range
    state.count_failure(BROKEN, 100.0)
    assert not state.may_use_range


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(("retry_after", "paused_s"), [(None, 2.0), (0.0, 0.0), (110.0, 110.0)])
def test_endpoint_that_limits_ranges_gets_no_request_as_long_as_it_asks_for(
    retry_after: float | None, paused_s: float
) -> None:
    """Others are asked at once. If there is none, the source has two minutes."""
    state = attempts(has_transfer_response=True, endpoint="http://one")
    state.count_failure(UpstreamRateLimited("429", retry_after=retry_after), 100.0, has_reader=True)
    assert (state.wait_s, state.pause() <= 0.1) == (None, True)
    waits = {url: error.next_request_in for url, error in state.ruled_out(100.0).items()}
    assert waits == ({"http://one": paused_s} if paused_s else {})
    assert state.ruled_out(100.0 + paused_s) == {}
    state.begin(2000, 101.0)
    state.count_failure(waiting(UpstreamRateLimited("429"), paused_s), 101.0, has_reader=True)
    assert state.wait_s == paused_s, "no other endpoint answers"
    assert not state.is_over(219.9, may_repeat=True)
    assert state.is_over(220.0, may_repeat=True)


@pytest.mark.row("U9-rate-limits")
def test_pause_of_more_than_two_minutes_after_the_429_of_a_range_is_not_waited_for() -> None:
    state = attempts(has_transfer_response=True, endpoint="http://one")
    state.count_failure(UpstreamRateLimited("429", retry_after=121.0), 100.0, has_reader=True)
    assert state.ruled_out(100.0) == {}
    assert state.is_over(145.0, may_repeat=True)


@pytest.mark.row("U9-rate-limits")
def test_stall_limit_is_the_usual_one_again_after_progress_behind_a_429_of_a_range() -> None:
    state = attempts(has_transfer_response=True, endpoint="http://one")
    state.count_failure(UpstreamRateLimited("429"), 100.0, has_reader=True)
    state.note_progress(103.0, 2000, ())
    assert state.ends_at == 148.0


@pytest.mark.row("U9-rate-limits")
def test_429s_of_an_endpoint_that_has_sent_ranges_never_leave_out_the_range() -> None:
    """All bytes would be sent again."""
    state = attempts(resumed_from=1, has_transfer_response=True, endpoint="http://one")
    state.note_progress(100.0, 2000, ["http://one"], has_split=True)
    for _ in range(30):
        state.count_failure(UpstreamRateLimited("429"), 100.0, has_reader=True)
        assert (state.may_use_range, state.is_over(219.0, may_repeat=True)) == (True, False)


def test_endpoint_without_progress_is_asked_last() -> None:
    state = attempts(endpoint="http://one")
    state.count_failure(BROKEN, 100.0)
    state.endpoint = "http://two"
    state.count_failure(BROKEN, 100.0)
    state.endpoint = "http://one"
    state.count_failure(BROKEN, 100.0)
    assert state.avoid == ["http://two", "http://one"]
    state.has_progressed, state.endpoint = True, "http://three"
    state.count_failure(BROKEN, 100.0)
    assert state.avoid == ["http://two", "http://one"]


@pytest.mark.row("FB9-wrong-content-range-then-whole")
@pytest.mark.parametrize("error", [Denied("403"), Unauthorized("401"), BlobUnknown("404")])
@pytest.mark.parametrize("has_responded", [True, False])
def test_refused_transfer_is_followed_by_one_request_without_a_range(
    error: MirrorError, *, has_responded: bool
) -> None:
    state = attempts(validator="x", resumed_from=1, has_responded=has_responded)
    state.count_failure(error, 100.0)
    assert (state.may_use_range, state.validator, state.is_over(100.0)) == (False, None, False)
    state.count_failure(error, 100.0)
    assert state.is_over(100.0)


@pytest.mark.row("FB9-wrong-content-range-then-whole")
def test_transfer_that_the_storage_refuses_is_repeated_without_a_range() -> None:
    state = attempts()
    for _ in range(2):
        state.count_failure(StorageRefused("403"), 100.0)
        assert (state.may_use_range, state.is_over(100.0)) == (False, False)


@pytest.mark.row("FB9-wrong-content-range-then-whole")
@pytest.mark.parametrize("error", [Denied("403"), BlobUnknown("404"), BROKEN])
def test_request_from_the_start_that_is_refused_is_not_repeated(error: MirrorError) -> None:
    state = attempts(has_responded=False)
    state.count_failure(error, 100.0)
    assert state.is_over(100.0)


@pytest.mark.row("FB9-wrong-content-range-then-whole")
@pytest.mark.parametrize(
    ("error", "is_repeated"),
    [
        (UpstreamUnavailable("500", scope=FailureScope.REQUEST), True),
        (UpstreamUnavailable("502", scope=FailureScope.SAME_KIND), True),
        (StorageRefused("403"), True),
        (UpstreamProtocolError("400"), True),
        (UpstreamUnavailable("no connection", scope=FailureScope.ENDPOINT), False),
        (UpstreamTimeout("late", scope=FailureScope.SAME_KIND), False),
        (UpstreamRateLimited("429"), False),
        (waiting(AllCircuitsOpen("not asked")), False),
        (waiting(UpstreamRateLimited("a pause")), False),
    ],
)
def test_first_request_with_a_range_is_repeated_once_without_one_if_the_server_failed_it(
    error: MirrorError, *, is_repeated: bool
) -> None:
    state = attempts(resumed_from=1, has_responded=False)
    state.count_failure(error, 100.0)
    assert (state.may_use_range, state.is_over(100.0)) == (not is_repeated, not is_repeated)
    state.count_failure(error, 100.0)
    assert state.is_over(100.0)


def test_request_that_fails_beside_our_own_connections_is_repeated_3_times() -> None:
    state, repeated = attempts(), 0
    while state.reclaim(lambda endpoint: True, "https://one.example"):
        repeated += state.begin_repeat()
        assert not state.begin_repeat()
        assert (state.error, state.failed_in_a_row) == (None, 0), "clients that come now wait, too"
    assert repeated == 3
    assert not attempts().reclaim(lambda endpoint: False, "https://one.example")


@pytest.mark.parametrize(
    "error",
    [
        Denied("403"),
        Unauthorized("401"),
        BlobUnknown("404"),
        StorageRefused("403"),
        UpstreamUnavailable("502", scope=FailureScope.SAME_KIND),
    ],
    ids=repr,
)
def test_source_that_was_read_by_several_connections_has_until_the_stall_limit_for_a_request(
    error: MirrorError,
) -> None:
    """Its plain response, which would have needed no further request, was given up for ranges."""
    state = attempts(resumed_from=1)
    error.endpoint = "http://one"
    state.note_progress(100.0, 2000, ["http://one"], has_split=True)
    for _ in range(20):
        state.begin(2000, 100.0)
        state.count_failure(error, 100.0, has_reader=True)
        assert not state.is_over(144.0, may_repeat=True)
        assert state.may_use_range
        assert state.pause() <= 5.0
    assert state.is_over(145.0, may_repeat=True)
    assert state.is_over(100.0), "another source can be tried, or no client has a byte"


def test_failure_after_one_beside_our_own_connections_at_another_endpoint_counts() -> None:
    state = attempts()
    assert state.reclaim(lambda endpoint: True, "https://one.example")
    state.begin(0, 100.0)
    assert not state.begin_repeat()
