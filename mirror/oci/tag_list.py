"""The tags of one repository as one text: names in lexical order, separated by line feeds.

Lives here: reading a page of ``tags/list`` (Distribution, "Listing Tags"), joining pages that are
in any order, and cutting our own pages. Must not know: requests, where a list is kept.

A text, because a million tags take 10 to 30 MB in it. As a list of strings they take 80 MB. The
grammar of a tag has ASCII characters only, and no line feed.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby, islice, pairwise
from operator import itemgetter
from typing import Final

from mirror.oci.errors import UpstreamProtocolError
from mirror.oci.reference import MAX_TAG_CHARS, is_tag

_NAME: Final = re.compile(r"[^\n]+")
MAX_PAGE_CHARS: Final = 2_000_000
"""Characters of a page for a client that sends no ``n``. Its JSON is at most twice as long, and
oras reads at most 4 MiB."""
_BATCH_TAGS: Final = 10_000
"""Tags that are joined at once. All of them as strings would take 80 MB for a million."""
_PIECE_CHARS: Final = 64 * 1024
"""Characters that are encoded at once, so that a long list takes no memory for each client."""
_CLOSE: Final = b"]}"


def parse_page(body: bytes) -> str:
    """Return the tags of one ``tags/list`` response, without names outside the grammar.

    Raises ``UpstreamProtocolError`` for a malformed document.
    """
    try:
        document = json.loads(body)
        names = document.get("tags") or []
    except (ValueError, AttributeError, RecursionError) as error:
        raise UpstreamProtocolError("the tag list is malformed") from error
    # Some fronts send the body of an error with status 200. It is no empty list.
    if not isinstance(names, list) or "errors" in document:
        raise UpstreamProtocolError("the tag list is malformed")
    return "\n".join(sorted({name for name in names if isinstance(name, str) and is_tag(name)}))


def join_pages(pages: Sequence[str]) -> str:
    """Join texts of :func:`parse_page` to one, in which each tag is there once.

    For a thread: a million tags that are not in lexical order take 2 to 4 s. Sorting all of them at
    once would take less, but no other thread could run meanwhile.
    """
    pages = [page for page in pages if page]
    if all(_last_name(one) < next(_names(two)) for one, two in pairwise(pages)):
        return "\n".join(pages)
    names = (name for name, _ in groupby(heapq.merge(*map(_names, pages))))
    parts = []
    while batch := list(islice(names, _BATCH_TAGS)):
        parts.append("\n".join(batch))
    return "\n".join(parts)


def _last_name(text: str) -> str:
    return text[text.rfind("\n") + 1 :]


def _names(text: str) -> Iterator[str]:
    return map(itemgetter(0), _NAME.finditer(text))


def cut_page(text: str, count: int | None, last: str | None) -> tuple[str, bool]:
    """Return the text of at most ``count`` tags after ``last``, and True if there are more.

    The cost does not depend on the length of the list.

    Args:
        text: The list.
        count: At least 1. None: as many as fit in :data:`MAX_PAGE_CHARS`.
        last: A tag that need not be in the list. None: from the first tag on.
    """
    start = 0 if last is None else _offset_after(text, last)
    if count is None:
        stop = start + MAX_PAGE_CHARS
        stop = len(text) if stop >= len(text) else text.rfind("\n", start, stop + 1)
        return text[start:stop], stop < len(text)
    # As long as ``count`` names can be, and a line feed. No other part of the list is copied.
    names = text[start : start + count * (MAX_TAG_CHARS + 1) + 1].split("\n", count)
    page = "\n".join(names[:count])
    return page, start + len(page) < len(text)


def encode(name: str, text: str) -> tuple[int, Iterator[bytes]]:
    """Encode a list as the JSON of a ``tags/list`` response.

    Args:
        name: The name of the repository.
        text: The tags. Their grammar has no character that JSON escapes.

    Returns:
        The length in bytes, and the JSON in pieces of about 64 KiB.
    """
    head = f'{{"name":{json.dumps(name)},"tags":['.encode()
    quote = b'"' if text else b""
    length = len(head) + len(text) + 2 * text.count("\n") + 2 * len(quote) + len(_CLOSE)
    return length, _pieces(head + quote, text, quote + _CLOSE)


def _pieces(head: bytes, text: str, end: bytes) -> Iterator[bytes]:
    if len(text) <= _PIECE_CHARS:
        yield head + _quoted(text) + end
        return
    yield head
    for start in range(0, len(text), _PIECE_CHARS):
        yield _quoted(text[start : start + _PIECE_CHARS])
    yield end


def _quoted(text: str) -> bytes:
    return text.replace("\n", '","').encode("ascii")


def _offset_after(text: str, last: str) -> int:
    """Return the offset of the first name after ``last``, by binary search."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        start = text.rfind("\n", low, middle) + 1 or low
        stop = text.find("\n", middle, high)
        stop = high if stop < 0 else stop
        if text[start:stop] <= last:
            low = stop + 1
        else:
            high = start
    return min(low, len(text))
