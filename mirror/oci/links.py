"""``Link`` (RFC 8288), as pagination needs it (Distribution, "Listing Tags").

Lives here: reading the target of the next page from an upstream's response, and writing our own.
Must not know: whether a request to a target is allowed (the outbound guard decides).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote, urlencode, urljoin, urlsplit

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


def page_target(base: str, path: str, target: str) -> str:
    """Return path and query of the page that a ``Link`` names, for a request to the same endpoint.

    A registry behind a proxy has its own idea of its scheme, its host, and the path of a repository
    (``Link: <http://internal:5000/v2/hub/app/tags/list?last=b>``). So scheme and host are left out,
    and so is the path if it is the path of this list in any repository.

    Args:
        base: URL of the request for the page before.
        path: Path of the list below the repository, such as ``tags/list``.
        target: The result of :func:`next_link`.

    Returns:
        The path and the query. A target that is no URL is returned unchanged.
    """
    try:
        parts = urlsplit(urljoin(base, target))
    except ValueError:
        return target
    own_path = urlsplit(base).path
    is_same_list = bool(path) and parts.path.endswith(f"/{path}")
    page_path = own_path if is_same_list else f"/{parts.path.lstrip('/')}"
    return f"{page_path}?{parts.query}"


def build_next(path: str, query: Mapping[str, str | int | None]) -> str:
    """Return a ``Link`` to the next page at ``path`` (decoded), without the Nones in ``query``.

    A relative ``path`` is resolved against the URL that the client has requested (RFC 8288, section
    3.1). So a proxy in front of us may add a prefix to our paths.
    """
    pairs = {name: value for name, value in query.items() if value is not None}
    target = quote(path, safe="/:@!$&'()*+,=~")
    return f'<{target}?{urlencode(pairs, quote_via=quote, safe="")}>; rel="next"'
