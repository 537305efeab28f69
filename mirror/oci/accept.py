"""``Accept`` (RFC 9110, section 12.5.1), as it is passed on to an upstream.

Lives here: the canonical form of a request's ``Accept`` lines, and which media types they take.
Clients that send the same media ranges in another order (Docker's order is random) share one
request to the upstream. Must not know: how an upstream chooses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from mirror.oci.descriptor import DEFAULT_ACCEPT
from mirror.oci.reference import Digest
from mirror.oci.text import TCHARS

# media-range with parameters (RFC 9110, section 12.5.1). Registry clients send tokens only.
_MEDIA_RANGE: Final = re.compile(
    rf"{TCHARS}/{TCHARS}(?:[ \t]*;[ \t]*{TCHARS}=(?:{TCHARS}|\"[ !#-\[\]-~]*\"))*", re.ASCII
)
_CURRENT_TYPES: Final = frozenset(DEFAULT_ACCEPT) - {"*/*"}
_MAX_MEDIA_RANGES: Final = 64
"""Media ranges of a request; clients send about ten."""
_MAX_ACCEPT_CHARS: Final = 4096
"""Characters of the canonical value; servers usually limit a header line to 8 KiB."""
_MAX_CACHED_ACCEPT_CHARS: Final = 1024
"""Characters of a request's lines that are cached; bounds the memory of the cache to 256 KiB."""


def parse_accept(lines: Iterable[str]) -> tuple[str, ...]:
    """Return the media ranges of all ``lines``: each once, sorted, wildcards last, at most 64.

    Malformed items are dropped. Without any media range the result is :data:`DEFAULT_ACCEPT`.
    Never raises.
    """
    given = tuple(lines)
    is_short = sum(map(len, given)) <= _MAX_CACHED_ACCEPT_CHARS
    return _parse_cached(given) if is_short else _parse(given)


def _parse(lines: tuple[str, ...]) -> tuple[str, ...]:
    ranges: set[str] = set()
    budget = _MAX_ACCEPT_CHARS
    for line in lines:
        for item in line[:_MAX_ACCEPT_CHARS].split(","):
            media_range = item.strip(" \t")
            if media_range in ranges or not _MEDIA_RANGE.fullmatch(media_range):
                continue
            budget -= len(media_range) + 1
            if budget < 0 or len(ranges) == _MAX_MEDIA_RANGES:
                return _sort(ranges)
            ranges.add(media_range)
    return _sort(ranges)


# The clients of a cluster send the same few values again and again.
_parse_cached: Final = lru_cache(256)(_parse)


def _sort(ranges: set[str]) -> tuple[str, ...]:
    return tuple(sorted(ranges, key=lambda item: ("*" in item, item))) or DEFAULT_ACCEPT


@lru_cache(256)
def variant_of(accept: tuple[str, ...]) -> str:
    """Name the set of media types of an old client. Empty if it takes every manifest type."""
    if set(accept) >= _CURRENT_TYPES or not has_media_types(accept):
        return ""
    return f" {Digest.of(','.join(sorted(accept)).encode()).hex[:16]}"


def has_media_types(accept: tuple[str, ...]) -> bool:
    """Return True if a client has named media types, and not just ``*/*``."""
    return any(value.strip() != "*/*" for value in accept)


def is_acceptable(accept: tuple[str, ...], media_type: str) -> bool:
    """Return True if a client that sent ``accept`` takes ``media_type``.

    The syntax is that of RFC 9110, section 12.5.1. Weights are ignored: also a range with ``q=0``
    counts as accepted.
    """
    if not accept:
        return True
    family = media_type.split("/", 1)[0] + "/*"
    ranges = {value.split(";", 1)[0].strip().lower() for value in accept}
    return bool(ranges & {"*/*", family, media_type.lower()})
