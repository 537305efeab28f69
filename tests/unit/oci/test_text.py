"""Untrusted text, made safe to print (row HU15)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.text import printable, size_text


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
