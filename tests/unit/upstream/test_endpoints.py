"""State of circuit breakers and order of endpoints, with time passed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mirror.upstream.endpoints import (
    DEFAULT_BACK_OFF_S,
    FAILURE_THRESHOLD,
    FIRST_OPEN_S,
    MAX_BACK_OFF_S,
    MAX_OPEN_S,
    CircuitBreaker,
    Endpoints,
)

A, B, C = (URL(f"https://{name}.example") for name in "abc")


def opened(now: float = 0.0) -> CircuitBreaker:
    """Return a circuit that has just opened."""
    circuit = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD):
        circuit.record_failure(now, is_probe=circuit.begin_request())
    return circuit


def test_circuit_opens_after_three_failures_in_a_row() -> None:
    circuit = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD - 1):
        circuit.record_failure(0.0, is_probe=False)
    circuit.record_success()
    for _ in range(FAILURE_THRESHOLD - 1):
        circuit.record_failure(0.0, is_probe=False)
        assert circuit.may_request(0.0)
    circuit.record_failure(0.0, is_probe=False)
    assert circuit.is_open
    assert not circuit.may_request(FIRST_OPEN_S - 0.01)
    assert circuit.may_request(FIRST_OPEN_S)


def test_repeated_failure_of_one_path_counts_once() -> None:
    circuit = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD):
        circuit.record_failure(0.0, is_probe=False, path="a")
    assert circuit.may_request(0.0)
    circuit.record_failure(0.0, is_probe=False, path="b")
    assert circuit.may_request(0.0)
    circuit.record_failure(5.0, is_probe=False, path="a")
    assert circuit.is_open
    assert circuit.open_until == 5.0 + FIRST_OPEN_S
    circuit.record_success()
    for path in ("a", "b"):
        circuit.record_failure(9.0, is_probe=False, path=path)
    assert circuit.may_request(9.0), "a success resets the failed path, too"


def test_failure_of_the_whole_endpoint_counts_each_time() -> None:
    circuit = CircuitBreaker()
    circuit.record_failure(0.0, is_probe=False, path="a")
    for _ in range(FAILURE_THRESHOLD - 1):
        assert circuit.may_request(0.0)
        circuit.record_failure(0.0, is_probe=False)
    assert circuit.is_open


def test_failed_probe_of_a_failed_path_doubles_the_open_time() -> None:
    circuit = CircuitBreaker()
    for path in ("a", "b", "c"):
        circuit.record_failure(0.0, is_probe=False, path=path)
    circuit.record_failure(FIRST_OPEN_S, is_probe=circuit.begin_request(), path="c")
    assert circuit.open_until == FIRST_OPEN_S + 2 * FIRST_OPEN_S


def test_half_open_circuit_permits_one_request() -> None:
    circuit = opened()
    assert circuit.begin_request()
    assert not circuit.may_request(FIRST_OPEN_S)
    assert not circuit.may_request(1e9), "however long the probe takes"


def test_successful_probe_closes_the_circuit() -> None:
    circuit = opened()
    circuit.begin_request()
    circuit.record_success()
    assert not circuit.is_open
    assert circuit.may_request(FIRST_OPEN_S)
    assert not circuit.begin_request()


def test_failed_probe_doubles_the_open_time_up_to_60_s() -> None:
    circuit, now, pauses = opened(), 0.0, [FIRST_OPEN_S]
    for _ in range(10):
        now = circuit.open_until
        circuit.record_failure(now, is_probe=circuit.begin_request())
        pauses.append(circuit.open_until - now)
    assert pauses[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[5:]) == {MAX_OPEN_S}
    circuit.record_success()
    for _ in range(FAILURE_THRESHOLD):
        circuit.record_failure(now, is_probe=False)
    assert circuit.open_until - now == FIRST_OPEN_S, "a success resets the open time"


def test_cancelled_probe_permits_the_next_one() -> None:
    circuit = opened()
    circuit.record_cancellation(is_probe=circuit.begin_request())
    assert circuit.may_request(FIRST_OPEN_S)
    circuit.begin_request()
    circuit.record_cancellation(is_probe=False)
    assert not circuit.may_request(FIRST_OPEN_S), "the cancelled request was not the probe"


@pytest.mark.row("U12-flapping-endpoint")
def test_many_concurrent_failures_open_the_circuit_once() -> None:
    circuit = CircuitBreaker()
    for _ in range(100):
        circuit.record_failure(0.0, is_probe=False)
    assert circuit.may_request(FIRST_OPEN_S), "later failures do not prolong it"
    circuit.begin_request()
    for _ in range(100):
        circuit.record_failure(FIRST_OPEN_S, is_probe=False)
    assert not circuit.may_request(1e9), "late failures do not end the probe"


def test_back_off_closes_the_circuit_and_permits_nothing_for_its_time() -> None:
    circuit = opened()
    circuit.begin_request()
    circuit.back_off(FIRST_OPEN_S, 10.0)
    assert not circuit.is_open
    assert not circuit.may_request(FIRST_OPEN_S + 9.9)
    assert circuit.may_request(FIRST_OPEN_S + 10.0)
    circuit.record_success()
    assert not circuit.may_request(FIRST_OPEN_S + 9.9), (
        "the success of an earlier request ends no pause"
    )


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [(7.0, 7.0), (0.0, 0.0), (86400.0, MAX_BACK_OFF_S), (None, DEFAULT_BACK_OFF_S)],
)
def test_back_off_lasts_as_requested_with_a_default_and_a_maximum(
    retry_after: float | None, seconds: float
) -> None:
    circuit = CircuitBreaker()
    circuit.back_off(100.0, retry_after)
    assert circuit.back_off_until == 100.0 + seconds
    assert circuit.may_request(100.0 + seconds)


def test_second_429_never_shortens_the_pause() -> None:
    circuit = CircuitBreaker()
    circuit.back_off(0.0, 60.0)
    circuit.back_off(1.0, None)
    circuit.back_off(1.0, 5.0)
    assert not circuit.may_request(59.0)
    assert circuit.has_retry_after


def test_candidates_are_in_order_and_avoided_ones_last() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.candidates(0.0) == [A, B, C]
    assert endpoints.candidates(0.0, [str(A), "https://unknown.example"]) == [B, C, A]
    assert endpoints.candidates(0.0, [str(A), str(B), str(C)]) == [A, B, C]
    assert endpoints.candidates(0.0, [str(B), str(A)]) == [C, B, A]
    assert endpoints.candidates(0.0, [str(A), str(B), str(A)]) == [C, B, A]


def test_candidates_leave_out_open_circuits_and_pauses() -> None:
    endpoints = Endpoints((A, B, C))
    for _ in range(FAILURE_THRESHOLD):
        endpoints.circuits[A].record_failure(0.0, is_probe=False)
    endpoints.circuits[B].back_off(0.0, 10.0)
    assert endpoints.candidates(1.0) == [C]
    assert endpoints.candidates(FIRST_OPEN_S) == [A, C]
    assert endpoints.candidates(10.0) == [A, B, C]


def test_remaining_pauses_name_only_times_of_the_endpoint() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.remaining_pauses(0.0) == []
    endpoints.circuits[A].back_off(0.0, 10.0)
    endpoints.circuits[B].back_off(0.0, None)
    assert endpoints.remaining_pauses(1.0) == [9.0, None], "clients are told no time that we chose"
    assert endpoints.remaining_pauses(10.0) == []


STEPS = st.lists(st.tuples(st.sampled_from("cfsar"), st.integers(0, 9), st.floats(0, 30)))


@given(STEPS)
def test_any_sequence_has_one_probe_at_a_time_and_ends_permitted(
    steps: list[tuple[str, int, float]],
) -> None:
    circuit, now = CircuitBreaker(), 0.0
    under_way: list[bool] = []
    for step, index, seconds in steps:
        now += seconds
        if step == "c":
            if circuit.may_request(now):
                under_way.append(circuit.begin_request())
                assert not (under_way[-1] and circuit.may_request(now + 1e9))
        elif under_way:
            probe = under_way.pop(index % len(under_way))
            match step:
                case "f":
                    circuit.record_failure(now, is_probe=probe)
                case "s":
                    circuit.record_success()
                case "a":
                    circuit.record_cancellation(is_probe=probe)
                case "r":
                    circuit.back_off(now, seconds)
    for probe in under_way:
        circuit.record_cancellation(is_probe=probe)
    assert circuit.may_request(now + max(MAX_OPEN_S, MAX_BACK_OFF_S))
