"""Untrusted text, made safe to print (row HU15); sizes, times and ages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.text import age_text, printable, size_text, time_text


@pytest.mark.row("HU15-hostile-error-bodies")
def test_control_and_non_ascii_characters_become_visible_escapes() -> None:
    assert printable("a\r\n\x1b[31m\x7f\x9b\u202e\ud800é") == (
        r"a\x0d\x0a\x1b[31m\x7f\x9b\u202e\ud800\xe9"
    )
    assert printable("plain text") == "plain text"
    assert printable("x" * 600, 10) == "xxxxxxx..."


@given(st.text(st.characters()), st.integers(3, 100))
def test_result_is_printable_ascii_within_the_limit(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= limit


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (1023, "1023B"), (1024, "1.0KiB"), (5 << 30, "5.0GiB"), (1 << 60, "1024.0PiB")],
)
def test_size_is_printed_in_the_largest_unit(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, None),
        (0.0, "1970-01-01T00:00:00Z"),
        (1.9, "1970-01-01T00:00:01Z"),
        (1_767_323_045.9, "2026-01-02T03:04:05Z"),
    ],
)
def test_time_is_rfc_3339_in_utc_in_whole_seconds(seconds: float | None, text: str | None) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-3, "0 s"), (0.4, "0 s"), (3.5, "3 s"), (119, "119 s"), (120, "2 min")),
        *((7200, "2 h"), (3 * 86400, "3 d")),
    ],
)
def test_age_is_printed_in_the_largest_unit_that_it_reaches_twice(
    seconds: float, text: str
) -> None:
    assert age_text(seconds) == text
