"""Whether the first further connection is worth the plain response."""

from __future__ import annotations

import pytest

from mirror.pull.ramp import MEASURE_S
from mirror.pull.trial import Trial, TrialResult

RATE = 10_000_000.0
MISSING = 100_000_000
SIZE = 6_000_000


def a_trial(rate: float = RATE, missing: int = MISSING) -> Trial:
    return Trial(rate, missing, SIZE)


def arrive(
    trial: Trial,
    *,
    share: float,
    plain: float = 1.0,
    latency: float = 0.02,
    seconds: float = MEASURE_S,
    missing: int = MISSING,
) -> TrialResult:
    """Let a range and the plain response bring bytes at parts of the rate. Returns the verdict."""
    trial.on_response(latency, latency)
    for step in range(1, 21):
        now = latency + seconds * step / 20
        trial.receive(now, int(plain * RATE * seconds / 20), is_plain=True)
        trial.receive(now, int(share * RATE * seconds / 20), is_plain=False)
        verdict = trial.judge(now, missing)
        if verdict is not TrialResult.OPEN:
            break
    return verdict


def test_first_request_costs_a_hundredth_of_the_blob_and_is_far_ahead() -> None:
    trial = a_trial()
    assert (trial.request_bytes, trial.lead) == (MISSING // 100, int(1.5 * RATE))
    assert a_trial(missing=20_000_000).request_bytes == 256 * 1024
    assert a_trial(missing=10_000_000_000).request_bytes == SIZE, "more needs too much memory"
    assert a_trial(missing=20_000_000).lead == 10_000_000


def test_good_first_request_is_followed_by_usual_ones() -> None:
    trial = a_trial()
    assert arrive(trial, share=1.0, seconds=0.11) is TrialResult.OPEN
    assert (trial.request_bytes, trial.lead) == (SIZE, int((0.02 + MEASURE_S) * RATE))


@pytest.mark.parametrize(
    ("share", "plain", "latency", "verdict"),
    [
        (1.0, 1.0, 0.02, TrialResult.GOOD),
        (0.7, 1.0, 0.02, TrialResult.GOOD),
        (0.5, 1.0, 0.02, TrialResult.SLOW),
        (0.001, 1.0, 0.02, TrialResult.SLOW),
        (0.5, 0.5, 0.02, TrialResult.NO_GAIN),
        (0.6, 0.6, 0.02, TrialResult.NO_GAIN),
        (1.0, 1.0, 0.9, TrialResult.GOOD),
        (1.0, 1.0, 3.0, TrialResult.NO_GAIN),
        (1.0, 0.1, 0.02, TrialResult.GOOD),
    ],
    ids=[
        "as-fast",
        "little-slower",
        "half-as-fast",
        "trickle",
        "shared",
        "nearly-shared",
        "late-headers",
        "too-late-headers",
        "plain-one-starves",
    ],
)
def test_trial_is_decided_by_both_rates_and_the_latency(
    share: float, plain: float, latency: float, verdict: TrialResult
) -> None:
    assert arrive(a_trial(), share=share, plain=plain, latency=latency) is verdict


def test_clear_rise_needs_less_time() -> None:
    assert arrive(a_trial(), share=1.0, seconds=0.25) is TrialResult.GOOD
    assert arrive(a_trial(), share=0.65, plain=0.65, seconds=0.25) is TrialResult.NO_GAIN


def test_begin_of_a_connection_is_not_held_against_the_first_request() -> None:
    """Its window grows: the last half of the bytes shows its rate."""
    trial = a_trial()
    trial.on_response(0.0, 0.02)
    trial.receive(0.15, 500_000, is_plain=False)
    trial.receive(0.15, 1_500_000, is_plain=True)
    trial.receive(0.19, 500_000, is_plain=False)
    trial.receive(0.19, 400_000, is_plain=True)
    assert trial.judge(0.19, MISSING) is TrialResult.OPEN
    assert trial.request_bytes == SIZE


def test_response_that_did_not_come_before_the_plain_one_met_it_is_slow() -> None:
    assert a_trial().judge(5.0, MISSING) is TrialResult.OPEN
    assert a_trial().judge(5.0, MISSING, is_due=True) is TrialResult.SLOW


def test_time_between_two_responses_does_not_count() -> None:
    trial = a_trial()
    arrive(trial, share=1.0, seconds=0.1)
    trial.on_end(0.12)
    assert trial.judge(9.0, MISSING) is TrialResult.OPEN


def test_little_that_is_missing_is_not_worth_it() -> None:
    assert arrive(a_trial(), share=1.0, missing=int(0.55 * RATE)) is TrialResult.NO_GAIN
