"""Connections to an endpoint: eight at most, and no more than it accepted a while ago."""

from __future__ import annotations

from contextlib import ExitStack

from mirror.pull.connection_budget import MAX_CONNECTIONS, ConnectionBudget

ONE, OTHER = "https://one.example", "https://other.example"


def counted(budget: ConnectionBudget, stack: ExitStack, count: int, endpoint: str = ONE) -> None:
    for _ in range(count):
        stack.enter_context(budget.connection(endpoint))


def test_each_endpoint_has_eight_and_first_connections_count_without_a_limit() -> None:
    budget = ConnectionBudget()
    with ExitStack() as stack:
        counted(budget, stack, MAX_CONNECTIONS - 1)
        assert budget.may_add(ONE)
        counted(budget, stack, 3)
        assert not budget.may_add(ONE)
        assert budget.may_add(OTHER)
    assert budget.may_add(ONE)


def test_refusal_is_remembered_for_ten_minutes_or_as_long_as_the_endpoint_asks() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda: clock[0])
    with ExitStack() as stack:
        counted(budget, stack, 3)
        budget.on_refused(ONE, 1.0)
    with ExitStack() as stack:
        counted(budget, stack, 1)
        assert budget.may_add(ONE)
        counted(budget, stack, 1)
        assert not budget.may_add(ONE)
        assert budget.may_add(OTHER)
        clock[0] = 600.0
        assert budget.may_add(ONE)
        budget.on_refused(ONE, 3600.0)
        clock[0] += 3599.0
        assert not budget.may_add(ONE)
        clock[0] += 1.0
        assert budget.may_add(ONE)


def test_endpoint_without_ranges_gets_no_second_connection_for_ten_minutes() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda: clock[0])
    budget.on_no_ranges(ONE)
    assert not budget.may_add(ONE)
    clock[0] = 600.0
    assert budget.may_add(ONE)
