"""Transient failures, delays, and ``Retry-After``."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci import errors
from mirror.oci.errors import MirrorError
from mirror.upstream.retry import backoff_delay, is_transient, parse_retry_after

NOW = 784_111_777.0
"""Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.UpstreamUnavailable("the upstream responded with 503"), True),
        (errors.UpstreamTimeout("slow"), False),
        (errors.UpstreamRateLimited("429", retry_after=1.0), False),
        (errors.UpstreamProtocolError("malformed"), False),
        (errors.OutboundRefused("realm"), False),
        (errors.Unauthorized("no"), False),
        (errors.ManifestUnknown("no"), False),
        (None, False),
    ],
)
def test_is_transient_only_for_broken_connections_and_5xx(
    error: MirrorError | None, expected: bool
) -> None:
    assert is_transient(error) is expected


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_backoff_delay_is_random_and_below_2_s(attempt: int, random: float) -> None:
    wait = backoff_delay(attempt, random)
    assert 0 <= wait < 2.0
    assert wait <= backoff_delay(attempt + 1, random)
    assert backoff_delay(attempt, 0.0) == 0.0
    assert wait == pytest.approx(backoff_delay(attempt, 0.5) * 2 * random)


def test_backoff_delay_doubles_up_to_2_s() -> None:
    assert [backoff_delay(attempt, 0.5) for attempt in range(1, 7)] == [
        0.1,
        0.2,
        0.4,
        0.8,
        1.0,
        1.0,
    ]


@pytest.mark.row("U9-rate-limits")
@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        (" 7\t", 7.0),
        ("0", 0.0),
        ("99999999999", 86400.0),
        ("Sun, 06 Nov 1994 08:49:47 GMT", 10.0),
        ("Sun, 06 Nov 1994 08:49:47 -0000", 10.0),
        ("Sunday, 06-Nov-94 08:49:47 GMT", 10.0),
        ("Sun Nov  6 08:49:47 1994", 10.0),
        ("Sun, 06 Nov 1994 08:49:27 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400.0),
        (None, None),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("7, 8", None),
        ("soon", None),
        ("\u0667", None),
        ("9" * 500, None),
        ("Sun, 99 Nov 1994 08:49:47 GMT", None),
        ("Sun, 06 Nov 99999 08:49:47 GMT", None),
    ],
)
def test_parse_retry_after_reads_seconds_and_dates(
    header: str | None, seconds: float | None
) -> None:
    assert parse_retry_after(header, NOW) == seconds


def test_retry_after_date_without_a_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TZ", "Pacific/Auckland")
    time.tzset()
    try:
        assert parse_retry_after("Sun Nov  6 08:49:47 1994", NOW) == 10.0
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.text() | st.from_regex(r"[A-Za-z0-9 ,:+-]*"), st.floats(-1e12, 1e12))
def test_any_retry_after_is_at_most_a_day_and_never_raises(header: str, now: float) -> None:
    seconds = parse_retry_after(header, now)
    assert seconds is None or 0 <= seconds <= 86400
