"""The number of connections: one more while the last one was worth it."""

from __future__ import annotations

import pytest

from mirror.pull.ramp import MEASURE_S, Ramp, Step

SIZE = 8
PLENTY = 10**9


def measure(ramp: Ramp, now: float, rate: float, missing: int = PLENTY) -> Step:
    """Receive at a rate, from ``now`` on, for as long as a measurement takes."""
    ramp.receive(now, 0)
    now += MEASURE_S + 1e-9
    ramp.receive(now, int(rate * MEASURE_S))
    return ramp.evaluate(now, missing, SIZE)


def added(rate: float, limit: int = 4) -> Ramp:
    """Return a ramp that has measured one connection, and has a second one."""
    ramp = Ramp(limit)
    assert measure(ramp, 0.0, rate) is Step.ADD
    ramp.add()
    ramp.on_connections(1.0, 2)
    return ramp


def test_rate_is_measured_before_a_connection_is_added() -> None:
    ramp = Ramp(4)
    ramp.receive(0.0, 1000)
    assert ramp.evaluate(MEASURE_S - 0.01, PLENTY, SIZE) is Step.KEEP
    assert ramp.evaluate(MEASURE_S, PLENTY, SIZE) is Step.ADD
    assert ramp.wanted == 1, "the budgets have to allow it"


@pytest.mark.parametrize(
    ("missing", "rate"), [(995, 1000), (4 * SIZE, 10)], ids=["a-second", "four-pieces"]
)
def test_no_connection_is_added_when_little_is_missing(missing: int, rate: float) -> None:
    assert measure(Ramp(4), 0.0, rate, missing) is Step.KEEP
    assert measure(Ramp(4), 0.0, rate, missing + 10) is Step.ADD


def test_gain_of_a_quarter_permits_the_next_connection() -> None:
    ramp = added(1000)
    assert measure(ramp, 1.0, 1260) is Step.ADD
    assert ramp.wanted == 2


def test_smaller_gain_is_measured_for_longer_and_then_undone_for_good() -> None:
    ramp = added(1000)
    assert measure(ramp, 1.0, 1200) is Step.KEEP
    assert ramp.evaluate(1.0 + 2 * MEASURE_S, PLENTY, SIZE) is Step.NO_GAIN
    ramp.back_off(ramp.wanted - 1)
    assert ramp.wanted == 1
    assert measure(ramp, 3.0, 5000) is Step.KEEP, "no more"


@pytest.mark.parametrize(("rate", "step"), [(300, Step.NO_GAIN), (1150, Step.NO_GAIN)])
def test_addition_after_which_the_rate_fell_is_undone_however_slow_all_are(
    rate: float, step: Step
) -> None:
    """A disk that seeks, or a server that slows down an address with many connections."""
    ramp = added(1000)
    assert ramp.accept_trial(2000, PLENTY, SIZE) is Step.ADD
    ramp.add()
    ramp.on_connections(2.0, 3)
    assert measure(ramp, 2.0, rate) is Step.KEEP
    assert ramp.evaluate(2.0 + 2 * MEASURE_S + 0.1, PLENTY, SIZE) is step


def test_connections_of_slow_nodes_are_not_closed() -> None:
    ramp = added(1000)
    assert ramp.accept_trial(1200, PLENTY, SIZE) is Step.ADD
    ramp.add()
    ramp.on_connections(2.0, 3)
    assert measure(ramp, 2.0, 1150) is Step.ADD


def test_addition_is_measured_once_it_has_a_response() -> None:
    ramp = Ramp(4)
    measure(ramp, 0.0, 1000)
    ramp.add()
    ramp.on_connections(0.5, 1)
    ramp.receive(0.6, 10**6)
    assert ramp.evaluate(9.0, PLENTY, SIZE) is Step.KEEP
    ramp.on_connections(10.0, 2)
    assert measure(ramp, 10.0, 900) is Step.KEEP


@pytest.mark.parametrize(("part", "step"), [(0.2, Step.ADD), (0.8, Step.KEEP)])
def test_no_connection_is_added_while_bytes_wait_in_the_sockets(part: float, step: Step) -> None:
    ramp = Ramp(4)
    ramp.receive(0.0, 0)
    ramp.receive(0.1, int(1000 * part), unread=2**20)
    ramp.receive(MEASURE_S, int(1000 * (1 - part)), unread=2**17)
    assert ramp.evaluate(MEASURE_S, PLENTY, SIZE) is step


def test_connections_have_a_limit() -> None:
    ramp = added(1000, limit=2)
    assert measure(ramp, 1.0, 2000) is Step.KEEP
    assert ramp.wanted == 2


def test_backing_off_is_for_good() -> None:
    ramp = added(1000)
    ramp.back_off(1)
    assert (ramp.wanted, ramp.is_adding) == (1, False)
    assert measure(ramp, 2.0, 9000) is Step.KEEP
