"""Connections to an endpoint: eight at most, and no more than it accepted a while ago."""

from __future__ import annotations

from mirror.pull.connection_budget import MAX_PER_ENDPOINT, ConnectionBudget

ONE, OTHER = "https://one.example", "https://other.example"


def test_each_endpoint_has_eight_and_first_connections_count_without_a_limit() -> None:
    first = [5]
    budget = ConnectionBudget(lambda endpoint: first[0] if endpoint == ONE else 0)
    budget.hold("fetch", ONE, MAX_PER_ENDPOINT - 6)
    assert budget.may_add(ONE)
    with budget.connection(ONE):
        assert not budget.may_add(ONE)
        assert budget.may_add(OTHER)
    assert budget.may_add(ONE)
    first[0] = 9
    assert not budget.may_add(ONE)
    assert budget.count(ONE) == 11


def test_owner_holds_connections_to_one_endpoint() -> None:
    budget = ConnectionBudget(lambda endpoint: 0)
    budget.hold("fetch", ONE, 3)
    budget.hold("fetch", OTHER, 2)
    assert (budget.count(ONE), budget.count(OTHER)) == (0, 2)
    budget.hold("fetch", OTHER, 0)
    assert budget.count(OTHER) == 0


def test_refusal_is_remembered_for_ten_minutes() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 1, lambda: clock[0])
    budget.hold("fetch", ONE, 2)
    budget.on_refused(ONE, 0.0)
    budget.hold("fetch", ONE, 0)
    assert budget.may_add(ONE)
    with budget.connection(ONE):
        assert not budget.may_add(ONE)
        assert budget.may_add(OTHER)
        clock[0] = 600.0
        assert budget.may_add(ONE)


def test_endpoint_that_asks_for_a_pause_gets_no_further_connection_in_it() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 1, lambda: clock[0])
    budget.hold("fetch", ONE, 3)
    budget.on_refused(ONE, 20.0)
    budget.hold("fetch", ONE, 0)
    assert not budget.may_add(ONE)
    assert budget.may_add(OTHER)
    clock[0] = 20.0
    assert budget.may_add(ONE)


def test_endpoint_without_ranges_gets_no_second_connection_for_ten_minutes() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 1, lambda: clock[0])
    budget.on_no_ranges(ONE)
    assert not budget.may_add(ONE)
    clock[0] = 600.0
    assert budget.may_add(ONE)


def test_further_connections_are_reclaimed_for_ten_minutes_if_there_are_any() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 1, lambda: clock[0])
    assert not budget.reclaim(ONE)
    budget.hold("fetch", ONE, 2)
    assert not budget.reclaim(OTHER)
    assert not budget.is_reclaimed(ONE)
    assert budget.reclaim(ONE)
    assert budget.is_reclaimed(ONE)
    budget.hold("fetch", ONE, 0)
    assert not budget.may_add(ONE)
    clock[0] = 600.0
    assert budget.may_add(ONE)


def test_pause_after_a_refusal_is_ten_minutes_at_most() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 1, lambda: clock[0])
    budget.on_refused(ONE, 86_400.0)
    clock[0] = 599.0
    assert budget.is_paused(ONE)
    clock[0] = 600.0
    assert not budget.is_paused(ONE)
