"""Connections to an endpoint: eight at most, and no more than it accepted a while ago."""

from __future__ import annotations

import pytest

from mirror.oci.errors import (
    BlobUnknown,
    MirrorError,
    StorageRefused,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
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


def test_further_connections_give_way_to_a_first_request_that_has_failed() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 1, lambda: clock[0])
    limited = at_one(UpstreamRateLimited("429", retry_after=30.0))
    assert not budget.may_be_crowded("docker.io", limited), "there is no further connection"
    budget.hold("fetch", ONE, 3)
    assert budget.may_be_crowded("docker.io", limited)
    clock[0] = 29.0
    assert not budget.may_add(ONE), "it would take the place again"
    paused = UpstreamRateLimited("no request was sent", retry_after=1.0)
    budget.hold("fetch", ONE, 0)
    assert budget.may_be_crowded("docker.io", paused), "it met the same pause"
    assert not budget.may_be_crowded("ghcr.io", paused)
    clock[0] = 40.0
    assert not budget.may_be_crowded("docker.io", limited)


def without_token() -> MirrorError:
    error = UpstreamUnavailable("500")
    error.is_without_token = True
    return error


@pytest.mark.parametrize(
    ("error", "is_possible"),
    [
        (UpstreamUnavailable("reset"), True),
        (without_token(), False),
        (StorageRefused("403"), False),
        (BlobUnknown("404"), False),
        (UpstreamProtocolError("another size"), False),
    ],
)
def test_further_connections_are_no_cause_of_an_error_that_has_another(
    error: MirrorError, is_possible: bool
) -> None:
    budget = ConnectionBudget(lambda endpoint: 1)
    budget.hold("fetch", ONE, 3)
    assert budget.may_be_crowded("docker.io", at_one(error)) is is_possible


def at_one(error: MirrorError) -> MirrorError:
    """Return ``error`` as one of the endpoint ``ONE``."""
    if isinstance(error, UpstreamError):
        error.endpoint = ONE
    return error


def test_endpoint_cannot_stop_further_connections_for_longer_than_they_are_remembered() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 1, lambda: clock[0])
    budget.hold("fetch", ONE, 2)
    budget.on_refused(ONE, 86_400.0)
    clock[0] = 599.0
    assert budget.is_paused(ONE)
    clock[0] = 600.0
    assert not budget.is_paused(ONE)


def test_endpoint_with_wrong_bytes_gets_no_further_connection_for_a_while() -> None:
    clock = [0.0]
    budget = ConnectionBudget(lambda endpoint: 0, lambda: clock[0])
    budget.on_wrong_bytes([ONE])
    assert not budget.may_add(ONE)
    assert budget.may_add(OTHER)
    clock[0] = 600.0
    assert budget.may_add(ONE)
