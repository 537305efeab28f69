"""Circuits: opened by failures in a row, tried by one at a time, with time passed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mirror.upstream.endpoints import (
    BARE_REST,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    REST_LIMIT,
    THRESHOLD,
    Circuit,
    Endpoints,
)

A, B, C = (URL(f"https://{name}.example") for name in "abc")


def opened(now: float = 0.0) -> Circuit:
    """A circuit that has just opened."""
    circuit = Circuit()
    for _ in range(THRESHOLD):
        circuit.failed(now, probe=circuit.claim())
    return circuit


def test_it_opens_after_failures_in_a_row() -> None:
    circuit = Circuit()
    for _ in range(THRESHOLD - 1):
        circuit.failed(0.0, probe=False)
    circuit.succeeded()
    for _ in range(THRESHOLD - 1):
        circuit.failed(0.0, probe=False)
        assert circuit.permits(0.0)
    circuit.failed(0.0, probe=False)
    assert circuit.is_open
    assert not circuit.permits(FIRST_PAUSE - 0.01)
    assert circuit.permits(FIRST_PAUSE)


def test_a_path_that_fails_again_counts_once() -> None:
    circuit = Circuit()
    for _ in range(THRESHOLD):
        circuit.failed(0.0, probe=False, path="a")
    assert circuit.permits(0.0)
    circuit.failed(0.0, probe=False, path="b")
    assert circuit.permits(0.0)
    circuit.failed(5.0, probe=False, path="a")
    assert circuit.is_open
    assert circuit.open_until == 5.0 + FIRST_PAUSE
    circuit.succeeded()
    for path in ("a", "b"):
        circuit.failed(9.0, probe=False, path=path)
    assert circuit.permits(9.0), "a success forgets paths too"


def test_no_answer_to_anything_counts_each_time() -> None:
    circuit = Circuit()
    circuit.failed(0.0, probe=False, path="a")
    for _ in range(THRESHOLD - 1):
        assert circuit.permits(0.0)
        circuit.failed(0.0, probe=False)
    assert circuit.is_open


def test_a_try_that_fails_at_a_path_that_failed_doubles_the_pause() -> None:
    circuit = Circuit()
    for path in ("a", "b", "c"):
        circuit.failed(0.0, probe=False, path=path)
    circuit.failed(FIRST_PAUSE, probe=circuit.claim(), path="c")
    assert circuit.open_until == FIRST_PAUSE + 2 * FIRST_PAUSE


def test_half_open_lets_exactly_one_through() -> None:
    circuit = opened()
    assert circuit.claim()
    assert not circuit.permits(FIRST_PAUSE)
    assert not circuit.permits(1e9), "however long it takes"


def test_a_good_try_closes_it() -> None:
    circuit = opened()
    circuit.claim()
    circuit.succeeded()
    assert not circuit.is_open
    assert circuit.permits(FIRST_PAUSE)
    assert not circuit.claim()


def test_a_try_that_fails_doubles_the_pause_up_to_a_limit() -> None:
    circuit, now, pauses = opened(), 0.0, [FIRST_PAUSE]
    for _ in range(10):
        now = circuit.open_until
        circuit.failed(now, probe=circuit.claim())
        pauses.append(circuit.open_until - now)
    assert pauses[:5] == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert set(pauses[5:]) == {LONGEST_PAUSE}
    circuit.succeeded()
    for _ in range(THRESHOLD):
        circuit.failed(now, probe=False)
    assert circuit.open_until - now == FIRST_PAUSE, "a success forgets it"


def test_a_try_that_was_left_alone_lets_the_next_one_through() -> None:
    circuit = opened()
    circuit.abandoned(probe=circuit.claim())
    assert circuit.permits(FIRST_PAUSE)
    circuit.claim()
    circuit.abandoned(probe=False)
    assert not circuit.permits(FIRST_PAUSE), "it was not the one that tries"


@pytest.mark.row("U12")
def test_many_that_fail_together_open_it_once() -> None:
    circuit = Circuit()
    for _ in range(100):
        circuit.failed(0.0, probe=False)
    assert circuit.permits(FIRST_PAUSE), "one short outage is not a long one"
    circuit.claim()
    for _ in range(100):
        circuit.failed(FIRST_PAUSE, probe=False)
    assert not circuit.permits(1e9), "one that is late says nothing of the one that tries"


def test_a_429_is_an_answer_and_a_pause() -> None:
    circuit = opened()
    circuit.claim()
    circuit.rest(FIRST_PAUSE, 10.0)
    assert not circuit.is_open
    assert not circuit.permits(FIRST_PAUSE + 9.9)
    assert circuit.permits(FIRST_PAUSE + 10.0)
    circuit.succeeded()
    assert not circuit.permits(FIRST_PAUSE + 9.9), "an answer to an earlier question ends no pause"


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(7.0, 7.0), (0.0, 0.0), (86400.0, REST_LIMIT), (None, BARE_REST)],
)
def test_how_long_it_rests(asked: float | None, seconds: float) -> None:
    circuit = Circuit()
    circuit.rest(100.0, asked)
    assert circuit.resting_until == 100.0 + seconds
    assert circuit.permits(100.0 + seconds)


def test_the_longer_of_two_pauses_holds() -> None:
    circuit = Circuit()
    circuit.rest(0.0, 60.0)
    circuit.rest(1.0, None)
    circuit.rest(1.0, 5.0)
    assert not circuit.permits(59.0)
    assert circuit.rest_named


def test_endpoints_are_tried_in_order_and_those_to_avoid_last_in_theirs() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.candidates(0.0) == [A, B, C]
    assert endpoints.candidates(0.0, [str(A), "https://unknown.example"]) == [B, C, A]
    assert endpoints.candidates(0.0, [str(A), str(B), str(C)]) == [A, B, C]
    assert endpoints.candidates(0.0, [str(B), str(A)]) == [C, B, A]
    assert endpoints.candidates(0.0, [str(A), str(B), str(A)]) == [C, B, A]


def test_an_endpoint_that_is_left_alone_is_no_candidate() -> None:
    endpoints = Endpoints((A, B, C))
    for _ in range(THRESHOLD):
        endpoints.circuits[A].failed(0.0, probe=False)
    endpoints.circuits[B].rest(0.0, 10.0)
    assert endpoints.candidates(1.0) == [C]
    assert endpoints.candidates(FIRST_PAUSE) == [A, C]
    assert endpoints.candidates(10.0) == [A, B, C]


def test_who_rests_and_how_long_it_said() -> None:
    endpoints = Endpoints((A, B, C))
    assert endpoints.resting(0.0) == []
    endpoints.circuits[A].rest(0.0, 10.0)
    endpoints.circuits[B].rest(0.0, None)
    assert endpoints.resting(1.0) == [9.0, None], "a pause of ours is told to nobody"
    assert endpoints.resting(10.0) == []


STEPS = st.lists(st.tuples(st.sampled_from("cfsar"), st.integers(0, 9), st.floats(0, 30)))


@given(STEPS)
def test_never_two_tries_at_once_and_never_closed_for_ever(
    steps: list[tuple[str, int, float]],
) -> None:
    circuit, now = Circuit(), 0.0
    under_way: list[bool] = []
    for step, index, seconds in steps:
        now += seconds
        if step == "c":
            if circuit.permits(now):
                under_way.append(circuit.claim())
                assert not (under_way[-1] and circuit.permits(now + 1e9))
        elif under_way:
            probe = under_way.pop(index % len(under_way))
            match step:
                case "f":
                    circuit.failed(now, probe=probe)
                case "s":
                    circuit.succeeded()
                case "a":
                    circuit.abandoned(probe=probe)
                case "r":
                    circuit.rest(now, seconds)
    for probe in under_way:
        circuit.abandoned(probe=probe)
    assert circuit.permits(now + max(LONGEST_PAUSE, REST_LIMIT))
