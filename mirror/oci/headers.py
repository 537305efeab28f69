"""Header fields about content: media types, ranges, conditions.

Lives here: ``Content-Type`` (RFC 9110, section 8.3), ``ETag`` and its conditions (13), ``Range``
and ``Content-Range`` (14). Must not know: where the bytes are, or whether they have arrived.

A span is half open: ``stop`` is exclusive. The positions in a header are inclusive.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from mirror.oci.errors import RangeNotSatisfiable
from mirror.oci.reference import Digest


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The bytes from ``start`` up to ``stop`` (exclusive)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of bytes, at least 1."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Whole:
    """The response has the whole content: 200."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """The response has parts of the content: 206. With more than one span it is multipart.

    The spans are sorted and do not overlap.
    """

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class NeedsSize:
    """The response depends on the size of the content, which is not known yet."""


class ContentRange(NamedTuple):
    """``Content-Range`` of a response. ``stop`` is exclusive; ``total`` is None for ``*``."""

    start: int
    stop: int
    total: int | None


_Spec: TypeAlias = tuple[int | None, int | None]
"""(first, last) as in the header: (a, b), (a, None) for ``a-``, (None, n) for ``-n``."""

OCTET_STREAM: Final = "application/octet-stream"
# RFC 6838 section 4.2: restricted-name = restricted-name-first *126restricted-name-chars
_RESTRICTED: Final = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
_MEDIA_TYPE: Final = re.compile(rf"{_RESTRICTED}/{_RESTRICTED}", re.ASCII)
# Types that a web server sends for a file that it does not know, or for a page of its own.
_GENERIC_FAMILIES: Final = frozenset({"text", "binary", "multipart"})
_GENERIC_TYPES: Final = frozenset(
    {
        *("application/json", "application/xml", "application/xhtml+xml", OCTET_STREAM),
        "application/x-www-form-urlencoded",  # What curl sends with any body.
    }
)

MAX_SPANS: Final = 1024
"""Spans of one response: as many as a partial pull of Podman requests at once."""
_MAX_RANGE_CHARS: Final = 32 * 1024
"""Characters of ``Range``: enough for ``MAX_SPANS`` ranges of 32 characters."""

# range-unit "=" 1#( int-range / suffix-range ). A list may have empty elements (section 5.6.1).
_SPECIFIER: Final = re.compile(r"bytes=(?P<set>[0-9, \t-]+)", re.ASCII | re.IGNORECASE)
# int-range = first-pos "-" [ last-pos ]    suffix-range = "-" suffix-length
_SPEC: Final = re.compile(r"(?P<first>[0-9]{1,100})?-(?P<last>[0-9]{1,100})?", re.ASCII)
# Content-Range = "bytes" SP first-pos "-" last-pos "/" ( complete-length / "*" )
_CONTENT_RANGE: Final = re.compile(
    r"bytes (?P<first>[0-9]{1,19})-(?P<last>[0-9]{1,19})/(?:(?P<total>[0-9]{1,19})|\*)",
    re.ASCII | re.IGNORECASE,
)
# entity-tag = [ "W/" ] DQUOTE *etagc DQUOTE. Distribution takes a digest without quotes as well.
_ENTITY_TAG: Final = re.compile(
    r'[ \t,]*(?:(?:W/)?"(?P<opaque>[!#-~\x80-\xff]*)"|(?P<bare>[a-z0-9]+:[a-f0-9]+))'
    r"[ \t]*(?=,|\Z)"
)


def media_type_of(header: str | None) -> str:
    """Return a ``Content-Type`` without its parameters.

    A malformed or missing one gives ``application/octet-stream``, so the result is always safe in a
    header. Its case is kept, because clients compare it with the media type of a descriptor.
    """
    raw = (header or "").partition(";")[0].strip(" \t")
    return raw if _MEDIA_TYPE.fullmatch(raw) else OCTET_STREAM


def manifest_type_of(header: str | None) -> str:
    """Return the media type that a ``Content-Type`` states for a manifest.

    A generic type states nothing about a manifest: a static web server sends ``text/plain``, and a
    log-in page is ``text/html``. Such a type gives ``application/octet-stream``, as a missing or
    malformed one does.
    """
    media_type = media_type_of(header)
    name = media_type.lower()
    is_generic = name in _GENERIC_TYPES or name.partition("/")[0] in _GENERIC_FAMILIES
    return OCTET_STREAM if is_generic else media_type


def parse_range(header: str | None, size: int) -> Whole | Ranges:
    """Choose the response to ``Range`` for content of ``size`` bytes (RFC 9110, section 14.2).

    The result is :class:`Whole` if the header is absent, is malformed, has another unit than bytes,
    or would give more than :data:`MAX_SPANS` spans: a server may ignore ``Range``. Raises
    :class:`RangeNotSatisfiable`.

    Overlapping ranges become one span, adjacent ones do not, because Podman counts the parts. If
    several ranges were requested but one span is left, the result is :class:`Whole`, too: Podman
    would take a single part for all ranges.
    """
    specs = _parse_specs(header)
    if specs is None or size == 0:  # Content-Range cannot describe a part of 0 bytes
        return Whole()
    spans = sorted(span for spec in specs if (span := _resolve(spec, size)) is not None)
    if not spans:
        raise RangeNotSatisfiable(size)
    merged = [spans[0]]
    for span in spans[1:]:
        if span.start < merged[-1].stop:
            merged[-1] = Span(merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    if len(merged) > MAX_SPANS or (len(merged) == 1 and len(specs) > 1):
        return Whole()
    return Ranges(tuple(merged))


def bounded_spans(header: str | None, size: int) -> tuple[Span, ...]:
    """Return the spans of a ``Range`` that states an end for each range: ``a-b`` or ``-n``.

    They are those of :func:`parse_range`. Empty if the response has the whole content or no part of
    it, or if a range has no end (``a-``): some clients hang up after the bytes that they want.
    """
    specs = _parse_specs(header)
    if specs is None or any(first is not None and last is None for first, last in specs):
        return ()
    try:
        selected = parse_range(header, size)
    except RangeNotSatisfiable:
        return ()
    return selected.spans if isinstance(selected, Ranges) else ()


def parse_range_unsized(header: str | None) -> Whole | NeedsSize:
    """Choose the response to ``Range`` for content whose size is not known yet.

    ``bytes=0-`` gives :class:`Whole`: the client gets a 200, so it knows that it cannot resume.
    """
    specs = _parse_specs(header)
    return Whole() if specs is None or specs == [(0, None)] else NeedsSize()


def _parse_specs(header: str | None) -> list[_Spec] | None:
    """Return the ranges of the header, or None if it has to be ignored."""
    if header is None or len(header) > _MAX_RANGE_CHARS:
        return None
    specifier = _SPECIFIER.fullmatch(header.strip(" \t"))
    if specifier is None:
        return None
    specs: list[_Spec] = []
    for item in specifier["set"].split(","):
        text = item.strip(" \t")
        if not text:
            continue
        match = _SPEC.fullmatch(text)
        if match is None:
            return None
        first = None if match["first"] is None else int(match["first"])
        last = None if match["last"] is None else int(match["last"])
        if first is None and last is None:
            return None
        specs.append((first, last))
    return specs or None


def _resolve(spec: _Spec, size: int) -> Span | None:
    """Return the span of one range. None if it cannot be satisfied. ``size`` is at least 1."""
    first, last = spec
    if first is None:
        return Span(max(0, size - (last or 0)), size) if last else None
    # A range that ends before it begins is invalid (section 14.1.1), and may be rejected (14.2).
    # The conformance tests of the Distribution specification ask for that.
    if first >= size or (last is not None and last < first):
        return None
    return Span(first, size if last is None else min(last + 1, size))


# --- responses ----------------------------------------------------------------------------------


def content_range(span: Span, size: int) -> str:
    """Return ``Content-Range`` of a 206 with one part."""
    return f"bytes {span.start}-{span.stop - 1}/{size}"


def unsatisfied_range(size: int) -> str:
    """Return ``Content-Range`` of a 416."""
    return f"bytes */{size}"


def parse_content_range(header: str | None) -> ContentRange | None:
    """Parse ``Content-Range`` of an upstream's 206; None if it is absent or malformed."""
    match = None if header is None else _CONTENT_RANGE.fullmatch(header.strip(" \t"))
    if match is None:
        return None
    first, last = int(match["first"]), int(match["last"])
    total = None if match["total"] is None else int(match["total"])
    if last < first or (total is not None and total <= last):
        return None
    return ContentRange(first, last + 1, total)


@dataclass(frozen=True, slots=True)
class Multipart:
    """The framing of a response with several parts (RFC 9110, section 14.6).

    Send ``head(i)`` and the bytes of ``spans[i]`` for each span, then ``tail``: ``length`` bytes in
    all. ``boundary`` must be random, because content that holds the boundary could end a part.
    ``size`` is that of the whole content.
    """

    boundary: str
    media_type: str
    spans: tuple[Span, ...]
    size: int

    @property
    def content_type(self) -> str:
        """``Content-Type`` of the response."""
        return f"multipart/byteranges; boundary={self.boundary}"

    def head(self, index: int) -> bytes:
        """Return the bytes to send before those of ``spans[index]``."""
        opening = "\r\n--" if index else "--"
        return (
            f"{opening}{self.boundary}\r\n"
            f"Content-Type: {self.media_type}\r\n"
            f"Content-Range: {content_range(self.spans[index], self.size)}\r\n\r\n"
        ).encode("ascii")

    @property
    def tail(self) -> bytes:
        """The bytes to send after the last span."""
        return f"\r\n--{self.boundary}--\r\n".encode("ascii")

    @property
    def length(self) -> int:
        """``Content-Length`` of the response, in bytes."""
        parts = sum(len(self.head(i)) + span.length for i, span in enumerate(self.spans))
        return parts + len(self.tail)


# --- conditions ---------------------------------------------------------------------------------


def entity_tag(digest: Digest) -> str:
    """Return the ``ETag`` of content: a strong one, because a digest names exact bytes."""
    return f'"{digest}"'


def is_not_modified(if_none_match: str | None, etag: str) -> bool:
    """Return whether ``If-None-Match`` has ``etag``. Then the response is 304.

    Several header lines are joined by commas. The comparison is weak (RFC 9110, section 13.1.2). A
    malformed list ends at its first error.
    """
    if if_none_match is None:
        return False
    if if_none_match.strip(" \t") == "*":
        return True
    opaque, position = etag.strip('"'), 0
    while (match := _ENTITY_TAG.match(if_none_match, position)) is not None:
        if opaque in (match["opaque"], match["bare"]):
            return True
        position = match.end()
    return False


def is_range_applicable(if_range: str | None, etag: str) -> bool:
    """Return whether ``If-Range`` allows ``Range`` (RFC 9110, section 13.1.5).

    If it does not, the response has the whole content.


    The comparison is strong, so a weak tag never matches. Nor does a date: we send no
    ``Last-Modified``.
    """
    return if_range is None or if_range.strip(" \t") == etag
