"""Freshness: pull policies, times to live, and cached content in place of a failed upstream."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.config.settings import Upstream
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
from mirror.oci.reference import Digest, Repository, Tag
from mirror.pull.freshness import (
    ACCESS_TTL_S,
    CONFIRM_TIMEOUT_S,
    Ask,
    Fail,
    Fresh,
    Refuse,
    Stale,
    after_failure,
    confirm_timeout,
    decide_access,
    decide_by_age,
    decide_tag,
)
from mirror.store.records import AccessRecord, PreviousDigest, TagRecord


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
def test_decide_by_age_follows_pull_policy_and_ttl(
    policy: str, ttl: float, age: float | None, expected: object
) -> None:
    now = 2_000_000_000.0
    confirmed = None if age is None else now - age
    assert decide_by_age(confirmed, upstream(pull_policy=policy, tag_ttl=ttl), now) == expected


@pytest.mark.row("K1-wrong-clock")
def test_confirmation_in_the_future_is_not_fresh() -> None:
    assert decide_by_age(1000.0, upstream(), 999.0) == Ask()


@given(st.floats(0, 4e9), st.floats(0, 4e9), st.floats(0, 1e9))
def test_fresh_means_younger_than_tag_ttl(confirmed: float, now: float, ttl: float) -> None:
    fresh = decide_by_age(confirmed, upstream(tag_ttl=ttl), now) == Fresh()
    assert fresh == (0 <= now - confirmed < ttl)


NEW, OLD = Digest.of(b"new"), Digest.of(b"old")
MOVED = TagRecord(
    *(Repository("docker.io", "app"), Tag("1.0"), NEW, 2e9, 2e9), (PreviousDigest(OLD, 1e9, 2e9),)
)


@pytest.mark.parametrize("serve_stale", [True, False])
@pytest.mark.parametrize("policy", ["Always", "IfNotPresent", "Never"])
def test_earlier_digest_of_a_tag_is_never_fresh(policy: str, serve_stale: bool) -> None:
    settings = upstream(pull_policy=policy, tag_ttl=math.inf, serve_stale=serve_stale)
    assert decide_tag(MOVED, NEW, settings, 2e9) == decide_by_age(2e9, settings, 2e9)
    nothing = decide_by_age(None, settings, 2e9)
    assert decide_tag(MOVED, None, settings, 2e9) == nothing
    assert decide_tag(None, None, settings, 2e9) == nothing
    before = decide_tag(MOVED, OLD, settings, 2e9)
    if policy == "Never" and serve_stale:
        assert isinstance(before, Stale)
    else:
        assert before == nothing


FAILURES = [
    UpstreamUnavailable("down"),
    UpstreamTimeout("slow"),
    UpstreamRateLimited("429", retry_after=5),
    DigestMismatch("wrong"),
]


@pytest.mark.parametrize("error", FAILURES)
def test_upstream_failure_is_stale_only_with_a_fallback_and_serve_stale(error: MirrorError) -> None:
    assert after_failure(error, upstream(), has_fallback=True) == Stale(error.message)
    assert after_failure(error, upstream(), has_fallback=False) == Fail()
    assert after_failure(error, upstream(serve_stale=False), has_fallback=True) == Fail()


@pytest.mark.parametrize("error", [ManifestUnknown("404"), Denied("403"), Unauthorized("401")])
def test_401_403_404_never_fall_back_to_cached_content(error: MirrorError) -> None:
    assert after_failure(error, upstream(), has_fallback=True) == Fail()


NOW = 2_000_000_000.0


def record(seconds: float | None) -> AccessRecord:
    """An access record that expires in so many seconds."""
    expires_at = None if seconds is None else NOW + seconds
    return AccessRecord(
        digest=Digest.of(b"x"),
        kind="blob",
        media_type="",
        size=1,
        referrer=None,
        expires_at=expires_at,
    )


@pytest.mark.parametrize(
    ("access_record", "expected"),
    [
        (None, Ask()),
        (record(None), Fresh()),
        (record(ACCESS_TTL_S), Fresh()),
        (record(0), Fresh()),
        (record(-1), Ask()),
        pytest.param(record(-365 * 86400.0), Ask(), marks=pytest.mark.row("K1-wrong-clock")),
        pytest.param(record(365 * 86400.0), Ask(), marks=pytest.mark.row("K1-wrong-clock")),
    ],
    ids=["unknown", "for good", "new", "its last second", "over", "a year", "a year ahead"],
)
def test_access_is_fresh_until_it_expires(
    access_record: AccessRecord | None, expected: object
) -> None:
    assert decide_access(access_record, upstream(), NOW) == expected
    assert decide_access(access_record, upstream(pull_policy="Always", tag_ttl=0), NOW) == expected
    # with the policy Never, access that was once granted stays
    never = Refuse() if access_record is None else Fresh()
    assert decide_access(access_record, upstream(pull_policy="Never"), NOW) == never


def test_confirm_timeout_is_limited_only_with_a_fallback_and_serve_stale() -> None:
    assert confirm_timeout(upstream(), has_fallback=True) == CONFIRM_TIMEOUT_S
    assert confirm_timeout(upstream(), has_fallback=False) is None
    assert confirm_timeout(upstream(serve_stale=False), has_fallback=True) is None
