"""How often an address may fail, with one user name and with many."""

from __future__ import annotations

import pytest

from mirror.access import failure_limit
from mirror.access.failure_limit import (
    ADDRESS_RECOVERY_S,
    MAX_ADDRESS_FAILURES,
    MAX_LOGIN_FAILURES,
    RECOVERY_S,
    FailureLimit,
)

CLIENT = "192.0.2.1"


def fail(limit: FailureLimit, count: int, client: str = CLIENT, user: str = "ann") -> None:
    for _ in range(count):
        limit.record_failure(client, user, 0.0)


def test_name_waits_after_the_last_allowed_failure_and_recovers() -> None:
    limit = FailureLimit()
    for _ in range(MAX_LOGIN_FAILURES):
        assert limit.seconds_to_wait(CLIENT, "ann", 0.0) == 0
        limit.record_failure(CLIENT, "ann", 0.0)
    assert limit.seconds_to_wait(CLIENT, "ann", 0.0) == RECOVERY_S
    assert limit.seconds_to_wait("192.0.2.2", "ann", 0.0) == 0
    assert limit.seconds_to_wait(CLIENT, "bob", 0.0) == 0
    assert limit.seconds_to_wait(CLIENT, "ann", RECOVERY_S) == 0
    limit.record_failure(CLIENT, "ann", RECOVERY_S)
    assert limit.seconds_to_wait(CLIENT, "ann", RECOVERY_S) == RECOVERY_S
    assert limit.seconds_to_wait(CLIENT, "ann", 1e9) == 0


def test_many_names_of_an_address_are_limited_but_for_those_that_have_logged_in_there() -> None:
    limit = FailureLimit()
    limit.record_login(CLIENT, "bob")
    for number in range(MAX_ADDRESS_FAILURES):
        assert limit.seconds_to_wait(CLIENT, f"name {number}", 0.0) == 0
        limit.record_failure(CLIENT, f"name {number}", 0.0)
    assert limit.seconds_to_wait(CLIENT, "another", 0.0) == ADDRESS_RECOVERY_S
    assert limit.seconds_to_wait(CLIENT, "bob", 0.0) == 0
    assert limit.seconds_to_wait("192.0.2.2", "another", 0.0) == 0
    fail(limit, MAX_LOGIN_FAILURES, user="bob")
    assert limit.seconds_to_wait(CLIENT, "bob", 0.0) == RECOVERY_S


def test_names_longer_than_a_user_can_have_count_as_one() -> None:
    limit = FailureLimit()
    for number in range(MAX_LOGIN_FAILURES):
        limit.record_failure(CLIENT, "x" * 300 + str(number), 0.0)
    assert limit.seconds_to_wait(CLIENT, "x" * 400, 0.0) == RECOVERY_S
    assert limit.seconds_to_wait(CLIENT, "x" * 256, 0.0) == 0


def test_clock_that_goes_back_forgives_nothing() -> None:
    limit = FailureLimit()
    for _ in range(MAX_LOGIN_FAILURES):
        limit.record_failure(CLIENT, "ann", 1000.0)
    assert limit.seconds_to_wait(CLIENT, "ann", 0.0) == RECOVERY_S


def test_ipv6_network_of_a_customer_counts_as_one() -> None:
    limit = FailureLimit()
    for number in range(MAX_LOGIN_FAILURES):
        fail(limit, 1, f"2001:db8::{number:x}")
    assert limit.seconds_to_wait("2001:db8::ffff", "ann", 0.0) > 0
    assert limit.seconds_to_wait("2001:db8:0:1::1", "ann", 0.0) == 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_limit, "_MAX_ENTRIES", 100)
    limit = FailureLimit()
    for number in range(200):
        fail(limit, 1, f"host-{number}")
        limit.record_login(f"host-{number}", "ann")
    tables = (limit._names._failures, limit._addresses._failures, limit._known)
    assert [len(table) for table in tables] == [100] * 3


def test_failures_at_the_same_time_make_nobody_wait_longer() -> None:
    limit = FailureLimit()
    fail(limit, 400)
    assert limit.seconds_to_wait(CLIENT, "ann", 0.0) == RECOVERY_S
