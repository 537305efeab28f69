"""Header fields about content: media types, ranges, and the conditions that guard them.

Lives here: ``Content-Type``, ``Range`` and ``Content-Range`` as spans of bytes, ``ETag`` and its
conditions (RFC 9110, sections 8.3, 13 and 14). Must not know: where the bytes are, or whether they
have arrived.

A span is half open, ``start`` to ``stop`` (exclusive), unlike the positions on the wire.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from mirror.oci.errors import RangeNotSatisfiable
from mirror.oci.reference import Digest


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The bytes from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """In bytes, at least 1."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Whole:
    """All of the content: 200."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Parts of the content: 206. Sorted, disjoint; one span is one part, several are multipart."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class NeedsSize:
    """The answer depends on the size of the content, which is not known yet."""


class ContentRange(NamedTuple):
    """``Content-Range`` of an answer; ``stop`` is exclusive, ``total`` None where it is ``*``."""

    start: int
    stop: int
    total: int | None


_Spec: TypeAlias = tuple[int | None, int | None]
"""(first, last) as on the wire: (a, b), (a, None) for ``a-``, (None, n) for ``-n``."""

OCTET_STREAM: Final = "application/octet-stream"
# RFC 6838 section 4.2: restricted-name = restricted-name-first *126restricted-name-chars
_RESTRICTED: Final = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
_MEDIA_TYPE: Final = re.compile(rf"{_RESTRICTED}/{_RESTRICTED}", re.ASCII)

SPAN_LIMIT: Final = 1024
"""Spans of one answer: as many as Podman's partial pulls ask for at once."""

_HEADER_LIMIT: Final = 32 * 1024
# range-unit "=" 1#( int-range / suffix-range ), and RFC 9110, section 5.6.1: empty elements
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
    """A ``Content-Type`` without its parameters; ``application/octet-stream`` if it is none.

    The result is safe in a header. Its case is kept: clients compare it with a descriptor's.
    """
    raw = (header or "").partition(";")[0].strip(" \t")
    return raw if _MEDIA_TYPE.fullmatch(raw) else OCTET_STREAM


def parse_range(header: str | None, size: int) -> Whole | Ranges:
    """What ``Range`` asks of a content of ``size`` bytes.

    Raises :class:`RangeNotSatisfiable`. Another unit, a malformed header and absurdly many ranges
    are ignored, as RFC 9110, section 14.2 allows: the whole answers every request for a part.

    Overlapping spans become one, adjacent ones do not: Podman counts the parts. Nor is a request
    for several ranges ever answered by a single part, which it would take for all of them.
    """
    specs = _parse_specs(header)
    if specs is None or size == 0:  # no Content-Range can describe a part of nothing
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
    if len(merged) > SPAN_LIMIT or (len(merged) == 1 and len(specs) > 1):
        return Whole()
    return Ranges(tuple(merged))


def parse_range_unsized(header: str | None) -> Whole | NeedsSize:
    """What ``Range`` asks of a content whose size is not known: nothing special, or to wait for it.

    ``bytes=0-`` is the whole, and a 200 tells the client truthfully that ranges do not work yet.
    """
    specs = _parse_specs(header)
    return Whole() if specs is None or specs == [(0, None)] else NeedsSize()


def _parse_specs(header: str | None) -> list[_Spec] | None:
    """None for what is to be ignored."""
    if header is None or len(header) > _HEADER_LIMIT:
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
        # "-" alone is none; "A int-range is invalid if the last-pos value is less than first-pos"
        if last is None if first is None else last is not None and last < first:
            return None
        specs.append((first, last))
    return specs or None


def _resolve(spec: _Spec, size: int) -> Span | None:
    """None for a range that cannot be satisfied. ``size`` is at least 1."""
    first, last = spec
    if first is None:
        return Span(max(0, size - (last or 0)), size) if last else None
    if first >= size:
        return None
    return Span(first, size if last is None else min(last + 1, size))


# --- what an answer says ------------------------------------------------------------------------


def content_range(span: Span, size: int) -> str:
    """``Content-Range`` of a 206 with one part."""
    return f"bytes {span.start}-{span.stop - 1}/{size}"


def unsatisfied_range(size: int) -> str:
    """``Content-Range`` of a 416."""
    return f"bytes */{size}"


def parse_content_range(header: str | None) -> ContentRange | None:
    """Which part an upstream says it sends; None if it does not say, or nonsense."""
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
    """An answer of several parts (RFC 9110, section 14.6): all of it but the bytes of the spans.

    ``boundary`` has to be random: content that could guess it could end a part. Send ``head(i)``
    and the bytes of ``spans[i]`` for each span, then ``tail``: ``length`` bytes in all.
    """

    boundary: str
    media_type: str
    spans: tuple[Span, ...]
    size: int

    @property
    def content_type(self) -> str:
        """``Content-Type`` of the answer."""
        return f"multipart/byteranges; boundary={self.boundary}"

    def head(self, index: int) -> bytes:
        """What goes before the bytes of the span at ``index``."""
        opening = "\r\n--" if index else "--"
        return (
            f"{opening}{self.boundary}\r\n"
            f"Content-Type: {self.media_type}\r\n"
            f"Content-Range: {content_range(self.spans[index], self.size)}\r\n\r\n"
        ).encode("ascii")

    @property
    def tail(self) -> bytes:
        """What goes after the last span."""
        return f"\r\n--{self.boundary}--\r\n".encode("ascii")

    @property
    def length(self) -> int:
        """``Content-Length`` of the answer, in bytes."""
        parts = sum(len(self.head(i)) + span.length for i, span in enumerate(self.spans))
        return parts + len(self.tail)


# --- conditions ---------------------------------------------------------------------------------


def entity_tag(digest: Digest) -> str:
    """``ETag`` of content: strong, since a digest names its bytes."""
    return f'"{digest}"'


def not_modified(if_none_match: str | None, etag: str) -> bool:
    """Whether ``If-None-Match`` (lines joined by commas) holds ``etag``: then 304.

    Weak comparison (RFC 9110, section 13.1.2). Garbage is no match.
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


def range_applies(if_range: str | None, etag: str) -> bool:
    """Whether ``Range`` is to be honoured (RFC 9110, section 13.1.5): otherwise the whole is sent.

    Strong comparison: a weak tag never matches, nor does a date, since we send none.
    """
    return if_range is None or if_range.strip(" \t") == etag
