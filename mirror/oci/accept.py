"""``Accept`` (RFC 9110, section 12.5.1), as far as it is passed on to an upstream.

Lives here: all of a request's ``Accept`` lines as one canonical value, so that clients that ask
for the same in another order (Docker sends a random one) share one request. Must not know: what
an upstream makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from mirror.oci.descriptor import DEFAULT_ACCEPT
from mirror.oci.text import TCHARS

# media-range with parameters; tokens only, which is what registry clients send
_MEDIA_RANGE: Final = re.compile(
    rf"{TCHARS}/{TCHARS}(?:[ \t]*;[ \t]*{TCHARS}=(?:{TCHARS}|\"[ !#-\[\]-~]*\"))*", re.ASCII
)
_LIMIT: Final = 64
_LENGTH_LIMIT: Final = 4096
_CACHED_LENGTH: Final = 1024


def parse_accept(lines: Iterable[str]) -> tuple[str, ...]:
    """The media ranges of all ``lines``: each once, sorted, wildcards last, at most 64.

    What is no media range is dropped; nothing left means :data:`DEFAULT_ACCEPT`. Never raises.
    """
    given = tuple(lines)
    return _remembered(given) if sum(map(len, given)) <= _CACHED_LENGTH else _parse(given)


def _parse(lines: tuple[str, ...]) -> tuple[str, ...]:
    ranges: set[str] = set()
    budget = _LENGTH_LIMIT
    for line in lines:
        for item in line[:_LENGTH_LIMIT].split(","):
            media_range = item.strip(" \t")
            if media_range in ranges or not _MEDIA_RANGE.fullmatch(media_range):
                continue
            budget -= len(media_range) + 1
            if budget < 0 or len(ranges) == _LIMIT:
                return _ordered(ranges)
            ranges.add(media_range)
    return _ordered(ranges)


# A fleet's clients send the same few values for ever.
_remembered: Final = lru_cache(256)(_parse)


def _ordered(ranges: set[str]) -> tuple[str, ...]:
    return tuple(sorted(ranges, key=lambda item: ("*" in item, item))) or DEFAULT_ACCEPT
