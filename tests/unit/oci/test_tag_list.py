"""The text of a tag list: reading pages, joining them, and cutting our own."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci import tag_list
from mirror.oci.errors import UpstreamProtocolError
from mirror.oci.reference import is_tag

NAME = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True)
NAMES = st.lists(NAME | st.sampled_from("aAbB"), max_size=40)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"tags": ["b", "a", "b"]}, ["a", "b"]),
        ({"tags": []}, []),
        ({"tags": None}, []),
        ({}, []),
        ({"tags": ["ok", "../no", "", "a" * 129, 7, None, ["x"], "also.ok"]}, ["also.ok", "ok"]),
        ({"tags": ["a\n", "a\nb", "b"]}, ["b"]),
    ],
)
def test_page_leaves_out_names_outside_the_grammar(document: object, names: list[str]) -> None:
    assert tag_list.parse_page(json.dumps(document).encode()) == "\n".join(names)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"7", b"\xff", b'{"tags":"abc"}', b'{"tags":{"a":1}}', b"[" * 50_000),
        b'{"errors":[{"code":"UNAUTHORIZED"}]}',
    ],
)
def test_malformed_document_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        tag_list.parse_page(body)


@given(st.binary() | st.text().map(str.encode))
def test_any_document_gives_valid_tags_or_a_typed_error(body: bytes) -> None:
    with contextlib.suppress(UpstreamProtocolError):
        assert all(is_tag(name) for name in tag_list.parse_page(body).split())


@pytest.mark.row("FC1-page-order")
@given(st.lists(NAMES, max_size=8))
def test_joined_pages_have_each_tag_once_in_lexical_order(pages: list[list[str]]) -> None:
    texts = [tag_list.parse_page(json.dumps({"tags": names}).encode()) for names in pages]
    assert tag_list.join_pages(texts).split() == sorted({name for page in pages for name in page})


@pytest.mark.row("FC1-page-order")
@given(NAMES, st.integers(1, 50), NAME | st.none())
def test_page_has_the_tags_after_last_and_tells_if_there_are_more(
    names: list[str], count: int, last: str | None
) -> None:
    text = "\n".join(sorted(set(names)))
    after = [name for name in sorted(set(names)) if last is None or name > last]
    page, has_more = tag_list.cut_page(text, count, last)
    assert (page.split(), has_more) == (after[:count], len(after) > count)
    assert tag_list.cut_page(text, None, last) == ("\n".join(after), False)


@pytest.mark.row("FC1-page-order")
@given(NAMES.filter(bool), st.integers(0, 400))
def test_pages_without_a_count_have_each_tag_once(names: list[str], room: int) -> None:
    text = "\n".join(sorted(set(names)))
    pages, last, has_more = list[str](), None, True
    limit = 128 + room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tag_list, "MAX_PAGE_CHARS", limit)
        while has_more:
            page, has_more = tag_list.cut_page(text, None, last)
            assert 0 < len(page) <= limit
            pages.append(page)
            last = page.rpartition("\n")[2]
    assert "\n".join(pages) == text


@given(NAMES)
def test_encoded_list_is_json_of_the_announced_length(names: list[str]) -> None:
    length, pieces = tag_list.encode('a/"b', "\n".join(names))
    body = b"".join(pieces)
    assert len(body) == length
    assert json.loads(body) == {"name": 'a/"b', "tags": names}


def test_long_list_is_encoded_in_pieces() -> None:
    names = [f"v{number:06}" for number in range(50_000)]
    length, pieces = tag_list.encode("a", "\n".join(names))
    parts = list(pieces)
    assert max(map(len, parts)) < 100_000
    assert json.loads(b"".join(parts))["tags"] == names
    assert sum(map(len, parts)) == length
