"""What failures of connections mean: pauses, the number of connections, the end of a transfer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mirror.oci.errors import (
    BlobUnknown,
    MirrorError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.pull.connection_failures import ConnectionFailures, Consequence, Failure
from mirror.upstream.api import MIN_PROGRESS_BYTES

RESET = UpstreamUnavailable("reset")
NOW = 1000.0


def a_failure(
    error: MirrorError = RESET, at: float = NOW, *, received: int = 0, is_only_request: bool = False
) -> Failure:
    """Return a failure of a request that was sent at the time ``at``, beside one that sends."""
    return Failure(
        error=error,
        asked_at=at,
        received=received,
        has_response=received > 0,
        is_plain=False,
        is_bad_trial=False,
        is_only_request=is_only_request,
        received_at=at,
    )


def failures() -> ConnectionFailures:
    return ConnectionFailures(NOW, idle=30.0, min_rate=1000)


def fail(policy: ConnectionFailures, at: float, error: MirrorError = RESET) -> Consequence:
    return policy.on_failure(at, a_failure(error, at), 4, is_adding=False)


def is_over(policy: ConnectionFailures, at: float) -> bool:
    """Return whether the transfer ends if nobody fetches the front."""
    return policy.is_over(at, is_fetched=False, has_bytes=False)


def test_pause_after_each_further_failure_is_twice_as_long() -> None:
    policy, pauses = failures(), []
    for at in (NOW, NOW + 10, NOW + 20):
        fail(policy, at)
        pauses.append(round(policy.not_before - at, 3))
    assert pauses == [0.1, 0.2, 0.4]


def test_second_failure_in_a_row_leaves_one_connection_and_is_remembered() -> None:
    policy = failures()
    assert fail(policy, NOW) == Consequence("failed", 4)
    assert fail(policy, NOW + 1) == Consequence("failed", 1, refused_s=0.2)


def test_second_failure_after_an_addition_leaves_the_number_before() -> None:
    policy = failures()
    fail(policy, NOW)
    then = policy.on_failure(NOW + 1, a_failure(at=NOW + 1), 4, is_adding=True)
    assert then.connections == 3


def test_failures_of_requests_that_were_sent_before_the_last_one_are_one_failure() -> None:
    policy = failures()
    fail(policy, NOW + 1)
    for _ in range(3):
        assert policy.on_failure(NOW + 1, a_failure(at=NOW), 4, is_adding=False).connections == 4
    assert not is_over(policy, NOW + 2)


@pytest.mark.parametrize(
    ("asked_at", "count", "is_reset"),
    [
        (NOW + 2, MIN_PROGRESS_BYTES, True),
        (NOW + 2, MIN_PROGRESS_BYTES - 1, False),
        (NOW, MIN_PROGRESS_BYTES, False),
        (None, MIN_PROGRESS_BYTES, False),
    ],
    ids=["later", "too-few", "sent-before-the-failure", "first-response"],
)
def test_only_bytes_of_requests_that_were_sent_later_reset_the_count(
    asked_at: float | None, count: int, is_reset: bool
) -> None:
    policy = failures()
    fail(policy, NOW + 1)
    policy.on_progress(NOW + 3, count, asked_at)
    assert policy.is_retrying is not is_reset
    fail(policy, NOW + 4)
    assert is_over(policy, NOW + 5) is not is_reset


@pytest.mark.parametrize(
    ("retry_after", "wait"), [(None, 1.0), (0.0, 1.0), (7.0, 7.0)], ids=["none", "zero", "seven"]
)
def test_429_is_a_refusal_for_the_time_that_it_asks_for(
    retry_after: float | None, wait: float
) -> None:
    policy = failures()
    then = fail(policy, NOW, UpstreamRateLimited("429", retry_after=retry_after))
    is_long = wait > 2.0
    left = 1 if is_long else 4
    assert then == Consequence("rate_limited", left, refused_s=wait, has_pause=is_long)
    assert policy.not_before == NOW + wait, "no request is sent meanwhile"
    assert is_over(policy, NOW) is is_long, "other endpoints can be asked meanwhile"
    assert not policy.is_over(NOW, is_fetched=True, has_bytes=False)
    assert not is_over(policy, NOW + wait - 2.0), "the pause is over in a moment"


def test_second_429_in_a_row_ends_a_transfer_without_a_connection() -> None:
    policy = failures()
    for at in (NOW, NOW + 2):
        fail(policy, at, UpstreamRateLimited("429", retry_after=0.0))
    assert is_over(policy, NOW + 2)
    assert isinstance(policy.latest, UpstreamRateLimited)


@pytest.mark.parametrize(("whole", "is_too_often"), [(7, True), (9, False)])
def test_three_failures_within_16_whole_ranges_leave_one_connection_whatever_they_brought(
    whole: int, is_too_often: bool
) -> None:
    policy, then = failures(), Consequence("failed", 4)
    for at in (NOW, NOW + 10, NOW + 20):
        then = policy.on_failure(at, a_failure(at=at, received=10**6), 4, is_adding=False)
        for _ in range(whole):
            policy.on_complete()
        policy.on_progress(at + 1, 10**6, at + 1)
    assert then.connections == (1 if is_too_often else 4)
    assert then.is_useless is is_too_often, "remembered for the endpoint"


def test_range_that_breaks_while_ranges_are_on_trial_is_the_last_one() -> None:
    failure = replace(a_failure(received=10**6), is_bad_trial=True)
    then = failures().on_failure(NOW, failure, 2, is_adding=True)
    assert (then.connections, then.is_useless) == (1, True)


def test_wrong_range_leaves_one_connection_at_once() -> None:
    then = fail(failures(), NOW, UpstreamProtocolError("another range"))
    assert (then.reason, then.connections) == ("no_ranges", 1)


def test_three_wrong_ranges_in_a_row_do_not_end_the_transfer() -> None:
    policy = failures()
    for at in (NOW, NOW + 1, NOW + 2):
        fail(policy, at, UpstreamProtocolError("another range"))
    assert not is_over(policy, NOW + 3)
    fail(policy, NOW + 3, UpstreamProtocolError("another range"))
    assert is_over(policy, NOW + 3)


def test_refusal_of_a_further_connection_is_no_refusal_of_the_content() -> None:
    policy = failures()
    fail(policy, NOW, BlobUnknown("404"))
    assert type(policy.latest) is UpstreamUnavailable


@pytest.mark.parametrize("error", [RESET, UpstreamTimeout("none")])
def test_last_connection_that_breaks_ends_the_transfer(error: MirrorError) -> None:
    policy = failures()
    failure = a_failure(error, received=10**6, is_only_request=True)
    policy.on_failure(NOW, failure, 4, is_adding=False)
    assert is_over(policy, NOW)


def test_front_that_moves_too_slowly_ends_the_transfer_unless_the_reader_pauses() -> None:
    policy = failures()
    policy.on_progress(NOW + 10, 9_000, None)  # 900 bytes a second
    assert not policy.is_over(NOW + 29, is_fetched=True, has_bytes=False)
    assert policy.is_over(NOW + 30, is_fetched=True, has_bytes=False)
    assert not policy.is_over(NOW + 30, is_fetched=True, has_bytes=True)
    policy.pause(5)
    assert not policy.is_over(NOW + 30, is_fetched=True, has_bytes=False)
    policy.on_progress(NOW + 30, 30_000, None)
    assert not policy.is_over(NOW + 59, is_fetched=True, has_bytes=False)
