"""Freshness: pull policies, times to live, and what stands in for a failing upstream."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.config import Upstream
from mirror.oci.errors import (
    Denied,
    DigestMismatch,
    ManifestUnknown,
    MirrorError,
    Unauthorized,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.pull.freshness import Ask, Fail, Fresh, Refuse, Stale, after_failure, decide


def upstream(**changes: object) -> Upstream:
    return Upstream.model_validate({"endpoints": ("http://x",), **changes})


@pytest.mark.parametrize(
    ("policy", "ttl", "age", "expected"),
    [
        ("Always", 300, 0, Ask()),
        ("Always", math.inf, 0, Ask()),
        ("Always", 300, None, Ask()),
        ("IfNotPresent", 300, 0, Fresh()),
        ("IfNotPresent", 300, 299, Fresh()),
        ("IfNotPresent", 300, 300, Ask()),
        ("IfNotPresent", 0, 0, Ask()),
        ("IfNotPresent", math.inf, 10**9, Fresh()),
        ("IfNotPresent", 300, None, Ask()),
        ("Never", 0, 10**9, Fresh()),
        ("Never", 0, None, Refuse()),
    ],
)
def test_policies(policy: str, ttl: float, age: float | None, expected: object) -> None:
    now = 2_000_000_000.0
    confirmed = None if age is None else now - age
    assert decide(confirmed, upstream(pull_policy=policy, tag_ttl=ttl), now) == expected


@pytest.mark.row("K1")
def test_a_confirmation_in_the_future_is_not_fresh() -> None:
    assert decide(1000.0, upstream(), 999.0) == Ask()


@given(st.floats(0, 4e9), st.floats(0, 4e9), st.floats(0, 1e9))
def test_fresh_means_younger_than_the_ttl(confirmed: float, now: float, ttl: float) -> None:
    fresh = decide(confirmed, upstream(tag_ttl=ttl), now) == Fresh()
    assert fresh == (0 <= now - confirmed < ttl)


FAILURES = [
    UpstreamUnavailable("down"),
    UpstreamTimeout("slow"),
    UpstreamRateLimited("429", retry_after=5),
    DigestMismatch("wrong"),
]


@pytest.mark.parametrize("error", FAILURES)
def test_a_failure_is_bridged_by_what_is_held(error: MirrorError) -> None:
    assert after_failure(error, upstream(), held=True) == Stale(error.message)
    assert after_failure(error, upstream(), held=False) == Fail()
    assert after_failure(error, upstream(serve_stale=False), held=True) == Fail()


@pytest.mark.parametrize("error", [ManifestUnknown("404"), Denied("403"), Unauthorized("401")])
def test_a_no_is_an_answer(error: MirrorError) -> None:
    assert after_failure(error, upstream(), held=True) == Fail()
