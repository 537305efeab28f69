"""``Link`` (RFC 8288), as pagination needs it (Distribution, "Listing Tags").

Lives here: reading the target of the next page from an upstream's response, and writing our own.
Must not know: whether a request to a target is allowed (the outbound guard decides).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote, urlencode

from mirror.oci.text import TCHARS

MAX_LINK_CHARS: Final = 8192
"""Characters of all ``Link`` lines of a response; servers usually limit a line to 8 KiB."""

# Link       = #link-value
# link-value = "<" URI-Reference ">" *( OWS ";" OWS link-param )
# link-param = token BWS [ "=" BWS ( token / quoted-string ) ]
_TARGET: Final = re.compile(r"[ \t,]*<(?P<target>[!#-;=?-\[\]_a-z~|^`{}]*)>")
_QUOTED: Final = r'"(?P<quoted>(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~])*)"'
_VALUE: Final = rf"[ \t]*=[ \t]*(?:{_QUOTED}|(?P<bare>{TCHARS}))"
_PARAMETER: Final = re.compile(rf"[ \t]*;[ \t]*(?:(?P<name>{TCHARS})(?:{_VALUE})?)?")
_END: Final = re.compile(r"[ \t]*(?:,|\Z)")


def next_link(headers: str | Iterable[str]) -> str | None:
    """Return the target of the first link with ``rel=next``, as it was written: maybe relative.

    Returns None without such a link, and for lines that are malformed or too long. Never raises.
    """
    budget = MAX_LINK_CHARS
    for line in (headers,) if isinstance(headers, str) else headers:
        budget -= len(line)
        if budget < 0:
            return None
        position = 0
        while (link := _TARGET.match(line, position)) is not None:
            relation: str | None = None
            position = link.end()
            while (parameter := _PARAMETER.match(line, position)) is not None:
                position = parameter.end()
                # section 3.3: "occurrences after the first MUST be ignored"
                if relation is None and (parameter["name"] or "").lower() == "rel":
                    relation = parameter["quoted"] or parameter["bare"] or ""
            if not (end := _END.match(line, position)):
                return None
            if relation is not None and "next" in relation.lower().split():
                return link["target"]
            position = end.end()
    return None


def build_next(path: str, query: Mapping[str, str | int | None]) -> str:
    """Return a ``Link`` to the next page at ``path`` (decoded), without the Nones in ``query``."""
    pairs = {name: value for name, value in query.items() if value is not None}
    target = quote(path, safe="/:@!$&'()*+,=~")
    return f'<{target}?{urlencode(pairs, quote_via=quote, safe="")}>; rel="next"'
