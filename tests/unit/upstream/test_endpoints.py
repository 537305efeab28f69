"""Circuits: opened by failures in a row, tried by one at a time, with time passed in."""

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
    """A circuit that has just opened."""
    circuit = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD):
        circuit.failed(now, probe=circuit.begin_request())
    return circuit


def test_it_opens_after_failures_in_a_row() -> None:
    circuit = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD - 1):
        circuit.failed(0.0, probe=False)
    circuit.succeeded()
    for _ in range(FAILURE_THRESHOLD - 1):
        circuit.failed(0.0, probe=False)
        assert circuit.may_request(0.0)
    circuit.failed(0.0, probe=False)
    assert circuit.is_open
    assert not circuit.may_request(FIRST_OPEN_S - 0.01)
    assert circuit.may_request(FIRST_OPEN_S)


def test_a_path_that_fails_again_counts_once() -> None:
    circuit = CircuitBreaker()
    for _ in range(FAILURE_THRESHOLD):
        circuit.failed(0.0, probe=False, path="a")
    assert circuit.may_request(0.0)
    circuit.failed(0.0, probe=False, path="b")
    assert circuit.may_request(0.0)
    circuit.failed(5.0, probe=False, path="a")
    assert circuit.is_open
    assert circuit.open_until == 5.0 + FIRST_OPEN_S
    circuit.succeeded()
    for path in ("a", "b"):
        circuit.failed(9.0, probe=False, path=path)
    assert circuit.may_request(9.0), "a success forgets paths too"


def test_no_answer_to_anything_counts_each_time() -> None:
    circuit = CircuitBreaker()
    circuit.failed(0.0, probe=False, path="a")
    for _ in range(FAILURE_THRESHOLD - 1):
        assert circuit.may_request(0.0)
        circuit.failed(0.0, probe=False)
    assert circuit.is_open


def test_a_try_that_fails_at_a_path_that_failed_doubles_the_pause() -> None:
    circuit = CircuitBreaker()
    for path in ("a", "b", "c"):
        circuit.failed(0.0, probe=False, path=path)
    circuit.failed(FIRST_OPEN_S, probe=circuit.begin_request(), path="c")
    assert circuit.open_until == FIRST_OPEN_S + 2 * FIRST_OPEN_S


def test_half_open_lets_exactly_one_through() -> None:
    circuit = opened()
    assert circuit.begin_request()
    assert not circuit.may_request(FIRST_OPEN_S)
    assert not circuit.may_request(1e9), "however long it takes"


def test_a_good_try_closes_it() -> None:
    circuit = opened()
    circuit.begin_request()
    circuit.succeeded()
    assert not circuit.is_open
    assert circuit.may_request(FIRST_OPEN_S)
    assert not circuit.begin_request()


def test_a_try_that_fails_doubles_the_pause_up_to_a_limit() -> None:
    circuit, now, pauses = opened(), 0.0, [FIRST_OPEN_S]
    for _ in range(10):
        now = circuit.open_until
        circuit.failed(now, probe=circuit.begin_request())
        pauses.append(circuit.open_until - now)
    assert pauses[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[5:]) == {MAX_OPEN_S}
    circuit.succeeded()
    for _ in range(FAILURE_THRESHOLD):
        circuit.failed(now, probe=False)
    assert circuit.open_until - now == FIRST_OPEN_S, "a success forgets it"


def test_a_try_that_was_left_alone_lets_the_next_one_through() -> None:
    circuit = opened()
    circuit.cancelled(probe=circuit.begin_request())
    assert circuit.may_request(FIRST_OPEN_S)
    circuit.begin_request()
    circuit.cancelled(probe=False)
    assert not circuit.may_request(FIRST_OPEN_S), "it was not the one that tries"


@pytest.mark.row("U12-flapping-endpoint")
def test_many_that_fail_together_open_it_once() -> None:
    circuit = CircuitBreaker()
    for _ in range(100):
        circuit.failed(0.0, probe=False)
    assert circuit.may_request(FIRST_OPEN_S), "one short outage is not a long one"
    circuit.begin_request()
    for _ in range(100):
        circuit.failed(FIRST_OPEN_S, probe=False)
    assert not circuit.may_request(1e9), "one that is late says nothing of the one that tries"


def test_a_429_is_an_answer_and_a_pause() -> None:
    circuit = opened()
    circuit.begin_request()
    circuit.back_off(FIRST_OPEN_S, 10.0)
    assert not circuit.is_open
    assert not circuit.may_request(FIRST_OPEN_S + 9.9)
    assert circuit.may_request(FIRST_OPEN_S + 10.0)
    circuit.succeeded()
    assert not circuit.may_request(FIRST_OPEN_S + 9.9), (
        "an answer to an earlier question ends no pause"
    )


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(7.0, 7.0), (0.0, 0.0), (86400.0, MAX_BACK_OFF_S), (None, DEFAULT_BACK_OFF_S)],
)
def test_how_long_it_rests(asked: float | None, seconds: float) -> None:
    circuit = CircuitBreaker()
    circuit.back_off(100.0, asked)
    assert circuit.back_off_until == 100.0 + seconds
    assert circuit.may_request(100.0 + seconds)


def test_the_longer_of_two_pauses_holds() -> None:
    circuit = CircuitBreaker()
    circuit.back_off(0.0, 60.0)
    circuit.back_off(1.0, None)
    circuit.back_off(1.0, 5.0)
    assert not circuit.may_request(59.0)
    assert circuit.has_named_delay


def test_endpoints_are_tried_in_order_and_those_to_avoid_last_in_theirs() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.candidates(0.0) == [A, B, C]
    assert endpoints.candidates(0.0, [str(A), "https://unknown.example"]) == [B, C, A]
    assert endpoints.candidates(0.0, [str(A), str(B), str(C)]) == [A, B, C]
    assert endpoints.candidates(0.0, [str(B), str(A)]) == [C, B, A]
    assert endpoints.candidates(0.0, [str(A), str(B), str(A)]) == [C, B, A]


def test_an_endpoint_that_is_left_alone_is_no_candidate() -> None:
    endpoints = Endpoints((A, B, C))
    for _ in range(FAILURE_THRESHOLD):
        endpoints.circuits[A].failed(0.0, probe=False)
    endpoints.circuits[B].back_off(0.0, 10.0)
    assert endpoints.candidates(1.0) == [C]
    assert endpoints.candidates(FIRST_OPEN_S) == [A, C]
    assert endpoints.candidates(10.0) == [A, B, C]


def test_who_rests_and_how_long_it_said() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.backing_off(0.0) == []
    endpoints.circuits[A].back_off(0.0, 10.0)
    endpoints.circuits[B].back_off(0.0, None)
    assert endpoints.backing_off(1.0) == [9.0, None], "a pause of ours is told to nobody"
    assert endpoints.backing_off(10.0) == []


STEPS = st.lists(st.tuples(st.sampled_from("cfsar"), st.integers(0, 9), st.floats(0, 30)))


@given(STEPS)
def test_never_two_tries_at_once_and_never_closed_for_ever(
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
                    circuit.failed(now, probe=probe)
                case "s":
                    circuit.succeeded()
                case "a":
                    circuit.cancelled(probe=probe)
                case "r":
                    circuit.back_off(now, seconds)
    for probe in under_way:
        circuit.cancelled(probe=probe)
    assert circuit.may_request(now + max(MAX_OPEN_S, MAX_BACK_OFF_S))
