"""``Link``: the next page of an upstream, and our own (row HU13)."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.links import MAX_LINK_CHARS, build_next, next_link


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ('</v2/a/tags/list?last=b&n=2>; rel="next"', "/v2/a/tags/list?last=b&n=2"),
        ("<https://r.example/v2/a/tags/list?n=1>;rel=next", "https://r.example/v2/a/tags/list?n=1"),
        ('<a>; rel="prev", <b>; title="x, <c>; rel=next"; rel="NEXT last"', "b"),
        (['<a>; rel="prev"', '<b>; rel="next"'], "b"),
        ('<a>; rel="prev"; rel="next"', None),
        ("<a>; rel=nextish", None),
        ("<a>", None),
        ("<a>; rel", None),
        ("<a>;;rel=next", "a"),
        (",, <a> ; rel = next ,", "a"),
        ("<>; rel=next", ""),
        ("<a>; rel=next; rel=prev", "a"),
        ("<a>; title=\"\\\"\"; rel=next", "a"),
        ("<a; rel=next", None),
        ("<a b>; rel=next", None),
        ("<a\r\nb>; rel=next", None),
        ("<a>; rel=next garbage", None),
        ("a; rel=next", None),
        ("", None),
        ([], None),
        (f"<{'a' * MAX_LINK_CHARS}>; rel=next", None),
    ],
)  # fmt: skip
def test_target_of_the_first_link_with_rel_next_is_returned(
    headers: str | list[str], expected: str | None
) -> None:
    assert next_link(headers) == expected


@given(st.text() | st.text(alphabet='<>;,="\\ relnxt'))
def test_any_text_gives_a_printable_target_or_none(header: str) -> None:
    found = next_link(header)
    assert found is None or (found.isprintable() and f"<{found}>" in header)


def test_link_to_the_next_page_encodes_its_query_and_omits_none() -> None:
    ours = build_next(
        "/v2/ghcr.io/a/tags/list", {"n": 0, "last": "v1", "ns": "reg:5000", "x": None}
    )
    assert ours == '</v2/ghcr.io/a/tags/list?n=0&last=v1&ns=reg%3A5000>; rel="next"'


TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


@given(TEXT, TEXT)
def test_link_that_we_build_is_parsed_to_the_same_path_and_query(path: str, last: str) -> None:
    target = next_link(build_next(f"/v2/{path}", {"last": last}))
    assert target is not None
    raw_path, _, query = target.partition("?")
    assert unquote(raw_path) == f"/v2/{path}"
    assert parse_qs(query) == {"last": [last]}
    assert urlsplit(target).fragment == ""
