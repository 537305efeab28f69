"""How often an address may fail."""

from __future__ import annotations

from mirror.access import failure_limit
from mirror.access.failure_limit import MAX_LOGIN_FAILURES, RECOVERY_S, FailureLimit


def test_address_waits_after_the_last_allowed_failure_and_recovers() -> None:
    limit = FailureLimit()
    for _ in range(MAX_LOGIN_FAILURES):
        assert limit.seconds_to_wait("192.0.2.1", 0.0) == 0
        limit.record("192.0.2.1", 0.0)
    assert limit.seconds_to_wait("192.0.2.1", 0.0) == RECOVERY_S
    assert limit.seconds_to_wait("192.0.2.2", 0.0) == 0
    assert limit.seconds_to_wait("192.0.2.1", RECOVERY_S) == 0
    limit.record("192.0.2.1", RECOVERY_S)
    assert limit.seconds_to_wait("192.0.2.1", RECOVERY_S) == RECOVERY_S
    assert limit.seconds_to_wait("192.0.2.1", 1e9) == 0


def test_clock_that_goes_back_forgives_nothing() -> None:
    limit = FailureLimit()
    for _ in range(MAX_LOGIN_FAILURES):
        limit.record("192.0.2.1", 1000.0)
    assert limit.seconds_to_wait("192.0.2.1", 0.0) == RECOVERY_S


def test_ipv6_network_of_a_customer_counts_as_one() -> None:
    limit = FailureLimit()
    for number in range(MAX_LOGIN_FAILURES):
        limit.record(f"2001:db8::{number:x}", 0.0)
    assert limit.seconds_to_wait("2001:db8::ffff", 0.0) > 0
    assert limit.seconds_to_wait("2001:db8:0:1::1", 0.0) == 0


def test_memory_is_bounded(monkeypatch: object) -> None:
    limit = FailureLimit()
    for number in range(failure_limit._MAX_ADDRESSES + 100):
        limit.record(f"host-{number}", 0.0)
    assert len(limit._failures) == failure_limit._MAX_ADDRESSES


def test_failures_at_the_same_time_make_nobody_wait_longer() -> None:
    limit = FailureLimit()
    for _ in range(400):
        limit.record("192.0.2.1", 0.0)
    assert limit.seconds_to_wait("192.0.2.1", 0.0) == RECOVERY_S
