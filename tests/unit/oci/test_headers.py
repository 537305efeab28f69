"""Ranges, multipart responses and conditions (rows L4, L6, U4)."""

from __future__ import annotations

import email
import email.policy
import string
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.oci.errors import RangeNotSatisfiable
from mirror.oci.headers import (
    MAX_SPANS,
    ContentRange,
    Multipart,
    NeedsSize,
    Ranges,
    Span,
    Whole,
    content_range,
    entity_tag,
    is_not_modified,
    is_range_applicable,
    parse_content_range,
    parse_range,
    parse_range_unsized,
    unsatisfied_range,
)
from mirror.oci.reference import Digest

SIZE = 100
DIGEST = Digest.of(b"content")
ETAG = entity_tag(DIGEST)


@pytest.mark.row("L4-ranges")
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-", [(0, 100)]),
        ("bytes=0-0", [(0, 1)]),
        ("bytes=5-9", [(5, 10)]),
        ("bytes=99-", [(99, 100)]),
        ("bytes=-1", [(99, 100)]),
        ("bytes=-100", [(0, 100)]),
        ("bytes=-101", [(0, 100)]),
        ("bytes=0-99", [(0, 100)]),
        ("bytes=0-100", [(0, 100)]),
        (f"bytes=1-{2**63}", [(1, 100)]),
        (f"bytes=1-{'9' * 100}", [(1, 100)]),
        (f"bytes=-{2**63}", [(0, 100)]),
        ("BYTES=0-0", [(0, 1)]),
        (" bytes=0-0 ", [(0, 1)]),
        ("bytes=, 0-0 ,", [(0, 1)]),
        ("bytes=000000000000000000000000005-6", [(5, 7)]),
        ("bytes=0-1,3-4", [(0, 2), (3, 5)]),
        ("bytes=0-1,\t3-4 , -1", [(0, 2), (3, 5), (99, 100)]),
        ("bytes=3-4,0-1", [(0, 2), (3, 5)]),
        ("bytes=0-1,2-3", [(0, 2), (2, 4)]),  # adjacent: Podman counts the parts
        ("bytes=0-5,3-9,20-30,25-26", [(0, 10), (20, 31)]),
        ("bytes=0-1,3-4,500-", [(0, 2), (3, 5)]),  # the satisfiable ones of several
    ],
)
def test_valid_range_gives_merged_sorted_spans(
    header: str, expected: list[tuple[int, int]]
) -> None:
    assert parse_range(header, SIZE) == Ranges(tuple(Span(*pair) for pair in expected))


@pytest.mark.row("L4-ranges")
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=,",
        "bytes=-",
        "bytes=a-b",
        "bytes=5",
        "bytes=0-1,x",
        "bytes=0-1;3-4",
        "bytes=+0-1",
        "bytes=0x0-1",
        "bytes=--1",
        "bytes=0-1-2",
        "bytes=0 - 1",
        "bytes =0-1",
        "bytes=0-1\n",
        "bytes=\u0661-\u0662",
        "bytes=0-1 3-4",
        f"bytes=0-{'9' * 101}",
        "items=0-1",
        "0-1",
        "bytes=" + "0-0," * 10_000,
    ],
)
def test_malformed_range_is_ignored(header: str | None) -> None:
    assert parse_range(header, SIZE) == Whole()
    assert parse_range_unsized(header) == Whole()


@pytest.mark.row("L4-ranges")
@pytest.mark.parametrize(
    "header",
    [
        "bytes=100-",
        "bytes=100-200",
        "bytes=-0",
        f"bytes={2**63}-",
        "bytes=100-,200-",
        "bytes=-00",
        "bytes=9-5",
    ],
)
def test_range_outside_the_content_raises_with_its_size(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        parse_range(header, SIZE)
    assert caught.value.size == SIZE


@pytest.mark.row("L4-ranges")
@pytest.mark.parametrize(
    "header", ["bytes=0-1,100-", "bytes=0-5,3-9", "bytes=-1,99-", "bytes=0-,-0", "bytes=0-1,9-5"]
)
def test_several_ranges_that_become_one_span_give_the_whole(header: str) -> None:
    assert parse_range(header, SIZE) == Whole()


@pytest.mark.row("L4-ranges")
def test_more_spans_than_podman_requests_give_the_whole() -> None:
    overlapping = "bytes=" + ",".join(f"{n}-{n + 1}" for n in range(1000))
    assert parse_range(overlapping, 10**6) == Whole()
    mixed = overlapping + ",5000-5001"
    assert parse_range(mixed, 10**6) == Ranges((Span(0, 1001), Span(5000, 5002)))
    apart = [f"{10 * n}-{10 * n + 1}" for n in range(MAX_SPANS + 1)]
    assert parse_range("bytes=" + ",".join(apart), 10**6) == Whole()
    assert isinstance(parse_range("bytes=" + ",".join(apart[:-1]), 10**6), Ranges)


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=-1", "bytes=5-", "bytes=0-0,2-3"])
def test_range_of_empty_content_gives_the_whole(header: str) -> None:
    assert parse_range(header, 0) == Whole()


def test_unknown_size_is_needed_for_all_ranges_but_the_whole() -> None:
    assert parse_range_unsized("bytes=0-") == Whole()
    for header in ("bytes=1-", "bytes=0-5", "bytes=-5", "bytes=0-,5-"):
        assert parse_range_unsized(header) == NeedsSize()


NUMBERS = st.integers(0, 130) | st.integers(0, 2**65)
SPECS = st.lists(
    st.one_of(
        st.tuples(NUMBERS, NUMBERS).map(lambda pair: f"{min(pair)}-{max(pair)}"),
        NUMBERS.map(lambda n: f"{n}-"),
        NUMBERS.map(lambda n: f"-{n}"),
    ),
    min_size=1,
    max_size=8,
)


def wanted(specs: list[str], size: int) -> set[int]:
    """The positions that ``specs`` name, computed one by one."""
    positions: set[int] = set()
    for spec in specs:
        first, _, last = spec.partition("-")
        if not first:
            positions |= set(range(max(0, size - int(last)), size))
        else:
            positions |= set(range(int(first), min(size, int(last) + 1 if last else size)))
    return positions


@given(SPECS, st.integers(1, 120))
def test_spans_cover_exactly_the_requested_positions(specs: list[str], size: int) -> None:
    positions = wanted(specs, size)
    try:
        found = parse_range("bytes=" + ", ".join(specs), size)
    except RangeNotSatisfiable:
        assert not positions
        return
    assert positions
    if isinstance(found, Whole):
        assert len(specs) > 1
        return
    spans = found.spans
    assert {p for span in spans for p in range(span.start, span.stop)} == positions
    assert all(0 <= span.start < span.stop <= size for span in spans)
    assert all(a.stop <= b.start for a, b in pairwise(spans))
    assert sum(span.length for span in spans) == len(positions)
    assert (len(specs) == 1) == (len(spans) == 1)


@given(st.text() | st.text(alphabet="bytes=0123456789-, "), st.integers(0, 200))
def test_any_text_raises_nothing_but_range_not_satisfiable(header: str, size: int) -> None:
    parse_range_unsized(header)
    parse_content_range(header)
    with suppress(RangeNotSatisfiable):
        assert isinstance(parse_range(header, size), Whole | Ranges)


# --- Content-Range ------------------------------------------------------------------------------


@pytest.mark.row("U4-wrong-range")
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes 0-499/1234", ContentRange(0, 500, 1234)),
        ("bytes 0-499/*", ContentRange(0, 500, None)),
        ("Bytes 5-5/6 ", ContentRange(5, 6, 6)),
        (None, None),
        ("", None),
        ("bytes */1234", None),
        ("bytes 5-4/10", None),
        ("bytes 0-10/10", None),
        ("bytes 0-1", None),
        ("bytes=0-1/2", None),
        ("bytes 0-/2", None),
        ("bytes -1-1/2", None),
        ("items 0-1/2", None),
        ("bytes 0-1/2\n", None),
        (f"bytes 0-{'9' * 20}/*", None),
    ],
)
def test_content_range_is_parsed_or_none(header: str | None, expected: ContentRange | None) -> None:
    assert parse_content_range(header) == expected


SPANS = st.tuples(st.integers(0, 10**9), st.integers(1, 10**9)).map(lambda p: Span(p[0], sum(p)))


@given(SPANS, st.integers(0, 10**9))
def test_content_range_that_we_build_is_parsed_to_the_same_span(span: Span, more: int) -> None:
    size = span.stop + more
    assert parse_content_range(content_range(span, size)) == (span.start, span.stop, size)


def test_unsatisfied_range_has_the_size() -> None:
    assert unsatisfied_range(7) == "bytes */7"


# --- multipart ----------------------------------------------------------------------------------


# Letters only, because the other parser reads lines of text.
LETTERS = st.text(string.ascii_letters, min_size=1, max_size=60).map(str.encode)


@given(LETTERS, SPECS)
def test_multipart_response_is_read_by_the_email_parser(content: bytes, specs: list[str]) -> None:
    try:
        found = parse_range("bytes=" + ",".join(specs), len(content))
    except RangeNotSatisfiable:
        return
    if isinstance(found, Whole):
        return
    parts = Multipart("8f6f0b7e", "application/octet-stream", found.spans, len(content))
    sent = b"".join(
        parts.head(i) + content[span.start : span.stop] for i, span in enumerate(found.spans)
    )
    sent += parts.tail
    assert len(sent) == parts.length
    head = f"Content-Type: {parts.content_type}\r\n\r\n".encode()
    message = email.message_from_bytes(head + sent, policy=email.policy.HTTP)
    read = [part for part in message.walk() if not part.is_multipart()]
    assert [part.get_payload() for part in read] == [
        content[span.start : span.stop].decode() for span in found.spans
    ]
    assert [part["Content-Range"] for part in read] == [
        content_range(span, len(content)) for span in found.spans
    ]


def test_multipart_framing_has_the_exact_bytes_of_rfc_9110() -> None:
    parts = Multipart("xyz", "a/b", (Span(0, 2), Span(3, 5)), 9)
    assert parts.content_type == "multipart/byteranges; boundary=xyz"
    assert parts.head(0) == b"--xyz\r\nContent-Type: a/b\r\nContent-Range: bytes 0-1/9\r\n\r\n"
    assert parts.head(1) == b"\r\n--xyz\r\nContent-Type: a/b\r\nContent-Range: bytes 3-4/9\r\n\r\n"
    assert parts.tail == b"\r\n--xyz--\r\n"
    assert parts.length == len(parts.head(0)) + len(parts.head(1)) + len(parts.tail) + 4


# --- conditions ---------------------------------------------------------------------------------


@pytest.mark.row("L6-conditional-requests")
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, False),
        ("", False),
        ("*", True),
        (" * ", True),
        (ETAG, True),
        (f"W/{ETAG}", True),
        (f'"other", {ETAG}', True),
        (f'"a,b" ,, W/{ETAG} , "c"', True),
        (str(DIGEST), True),
        (f'"x", {DIGEST}', True),
        ('"other"', False),
        (f'"{DIGEST}x"', False),
        (f'"x{DIGEST}"', False),
        (f'"x {ETAG}"', False),
        (f"garbage, {ETAG}", False),
        (f"w/{ETAG}", False),
        ("sha256:abc", False),
        ('"', False),
        (f"*, {ETAG}", False),
    ],
)
def test_if_none_match_compares_weakly_and_malformed_lists_do_not_match(
    header: str | None, expected: bool
) -> None:
    assert is_not_modified(header, ETAG) is expected


@pytest.mark.row("L6-conditional-requests")
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, True),
        (ETAG, True),
        (f" {ETAG} ", True),
        (f"W/{ETAG}", False),
        ('"other"', False),
        ("Wed, 21 Oct 2015 07:28:00 GMT", False),
        ("", False),
        ("*", False),
        (f"{ETAG}, {ETAG}", False),
    ],
)
def test_if_range_compares_strongly_and_dates_do_not_match(
    header: str | None, expected: bool
) -> None:
    assert is_range_applicable(header, ETAG) is expected


@given(st.text() | st.text(alphabet='W/"*, sha256:ab'))
def test_any_text_in_a_condition_neither_raises_nor_matches(header: str) -> None:
    assert is_not_modified(header, ETAG) == (header.strip(" \t") == "*")
    assert not is_range_applicable(header, ETAG)
