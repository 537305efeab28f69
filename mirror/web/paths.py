"""One pure function turns a request line into one typed request.

Lives here: the paths of the Distribution specification ("Endpoints"), and the choice of the
upstream. Must not know: aiohttp, what becomes of a request.

Works on the raw path, as it came over the wire: each part is percent-decoded once, after the
structure was read, and then held to its grammar. So an encoded slash or dot never makes structure,
and nothing that names a file was ever anything but a digest or a name of the specification.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NoReturn, TypeAlias
from urllib.parse import parse_qsl, unquote

from mirror.oci.errors import (
    DigestInvalid,
    InvalidRequest,
    MethodUnsupported,
    NameInvalid,
    NameUnknown,
    NotFound,
    PaginationInvalid,
    TagInvalid,
)
from mirror.oci.headers import media_type_of
from mirror.oci.reference import Digest, Reference, Repository, Tag, parse_reference


@dataclass(frozen=True, slots=True)
class Ping:
    """``/v2/``: is this a registry?"""


@dataclass(frozen=True, slots=True)
class Health:
    """``/healthz``: does the process live?"""


@dataclass(frozen=True, slots=True)
class Ready:
    """``/readyz``: should it get requests?"""


@dataclass(frozen=True, slots=True)
class Metrics:
    """``/metrics``."""


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """``ns``: what the client named the upstream, to be echoed in ``OCI-Namespace``."""

    repository: Repository
    reference: Reference
    ns: str | None


@dataclass(frozen=True, slots=True)
class BlobRequest:
    """A blob by digest."""

    repository: Repository
    digest: Digest
    ns: str | None


@dataclass(frozen=True, slots=True)
class TagsRequest:
    """``prefix``: what stood before the name in the path, ``docker.io/`` or nothing, for ``Link``.

    ``count`` None: not limited by the client. ``last`` is exclusive.
    """

    repository: Repository
    count: int | None
    last: str | None
    ns: str | None
    prefix: str


@dataclass(frozen=True, slots=True)
class ReferrersRequest:
    """``prefix``: see :class:`TagsRequest`."""

    repository: Repository
    digest: Digest
    artifact_type: str | None
    ns: str | None
    prefix: str


Request: TypeAlias = (
    ManifestRequest | BlobRequest | TagsRequest | ReferrersRequest | Ping | Health | Ready | Metrics
)

METHODS: Final = ("GET", "HEAD")
"""The methods that a pull-through mirror offers."""

_FIXED: Final[dict[str, Request]] = {
    "/v2/": Ping(),
    "/v2": Ping(),
    "/healthz": Health(),
    "/readyz": Ready(),
    "/metrics": Metrics(),
}

# Greedy: a repository may have components named "manifests" or "blobs", so the last one counts.
_PATH: Final = re.compile(
    r"/v2/(?P<name>[^?#]*)/"
    r"(?:(?P<kind>manifests|blobs|referrers)/(?P<reference>[^/?#]*)|tags/list)"
)
# What is left is an error; these say whose.
_UPLOAD: Final = re.compile(r"/v2/.*/blobs/uploads(?:/.*)?", re.DOTALL)
_BROKEN: Final = re.compile(r"/v2/.*?/(?P<kind>manifests|blobs|referrers)/(?P<rest>.*)", re.DOTALL)
_SUSPICIOUS: Final = re.compile(r"//|[%\\]|/\.{1,2}(?:/|\Z)|[^!-~]")
_ENCODED_SLASH: Final = re.compile(r"%2f", re.IGNORECASE)
_COUNT: Final = re.compile(r"[0-9]{1,9}", re.ASCII)

_FIELD_LIMIT: Final = 32
_CACHED_LENGTH: Final = 512
_CACHE_SIZE: Final = 4096


def parse(
    method: str, raw_path: str, query: str, *, upstreams: Collection[str], default: str
) -> Request:
    """Read a request. ``raw_path`` and ``query`` as on the wire, split at the first ``?``.

    Raises :class:`MethodUnsupported`, :class:`NotFound` for a path that is not served,
    :class:`NameUnknown` for an upstream that is not one of ``upstreams``, and an
    :class:`InvalidRequest` (``NameInvalid``, ``TagInvalid``, ``DigestInvalid``,
    ``PaginationInvalid``) for a part outside its grammar; nothing else.
    """
    if method not in METHODS:
        raise MethodUnsupported("a pull-through mirror takes no writes")
    if "#" in query:
        raise InvalidRequest("a fragment in the request target")
    match = _PATH.fullmatch(raw_path)
    if match is None:
        return _FIXED.get(raw_path) or _refuse(raw_path)
    name, kind, reference = match.groups()
    fields = _fields(query) if query else {}
    ns = fields.get("ns")
    repository, prefix = _repository(_decode(name, NameInvalid), ns, upstreams, default)
    if kind is None:
        return TagsRequest(repository, _count(fields), _last(fields), ns, prefix)
    if kind == "manifests":
        error = DigestInvalid if ":" in reference else TagInvalid
        return ManifestRequest(repository, parse_reference(_decode(reference, error)), ns)
    if kind == "blobs" and reference == "uploads":
        raise MethodUnsupported("a pull-through mirror takes no uploads")
    digest = Digest.parse(_decode(reference, DigestInvalid))
    if kind == "blobs":
        return BlobRequest(repository, digest, ns)
    return ReferrersRequest(repository, digest, _artifact_type(fields), ns, prefix)


def router(upstreams: Collection[str], default: str) -> Callable[[str, str, str], Request]:
    """:func:`parse` for fixed upstreams, with a bounded memory of the requests that were right."""
    names = frozenset(upstreams)

    def read(method: str, raw_path: str, query: str) -> Request:
        return parse(method, raw_path, query, upstreams=names, default=default)

    remembered = lru_cache(_CACHE_SIZE)(read)

    def route(method: str, raw_path: str, query: str) -> Request:
        short = len(raw_path) + len(query) <= _CACHED_LENGTH
        return remembered(method, raw_path, query) if short else read(method, raw_path, query)

    return route


# --- the parts ----------------------------------------------------------------------------------


def _decode(raw: str, error: type[InvalidRequest]) -> str:
    if "%" not in raw:
        return raw
    if _ENCODED_SLASH.search(raw):
        raise error("an encoded slash in the path")
    return unquote(raw, errors="replace")


def _repository(
    name: str, ns: str | None, upstreams: Collection[str], default: str
) -> tuple[Repository, str]:
    """The repository, and the prefix that named its upstream. With ``ns``, the path is literal."""
    if ns is not None:
        if ns not in upstreams:
            raise NameUnknown("this upstream is not mirrored")
        return Repository.parse(ns, name), ""
    first, slash, rest = name.partition("/")
    if slash and first in upstreams:
        return Repository.parse(first, rest), f"{first}/"
    if default not in upstreams:
        raise NameUnknown("this upstream is not mirrored")
    return Repository.parse(default, name), ""


def _fields(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=_FIELD_LIMIT)
    except ValueError:
        raise InvalidRequest("too many query parameters") from None
    fields: dict[str, str] = {}
    for name, value in pairs:
        # Two readers of one request must not differ in which upstream it means.
        if fields.setdefault(name, value) != value and name == "ns":
            raise InvalidRequest("more than one ns")
    return fields


def _count(fields: dict[str, str]) -> int | None:
    raw = fields.get("n")
    if raw is None:
        return None
    if not _COUNT.fullmatch(raw):
        raise PaginationInvalid("n is not a number of tags")
    return int(raw)


def _last(fields: dict[str, str]) -> str | None:
    raw = fields.get("last")
    if not raw:
        return None
    try:
        return Tag.parse(raw).name
    except TagInvalid:
        raise PaginationInvalid("last is not a tag") from None


def _artifact_type(fields: dict[str, str]) -> str | None:
    # A plus that the client did not encode reads as a space, which no media type has.
    raw = fields.get("artifactType", "").replace(" ", "+")
    if raw and media_type_of(raw) != raw:
        raise InvalidRequest("artifactType is not a media type")
    return raw or None


def _refuse(raw_path: str) -> NoReturn:
    """The right error for a path that is none of ours."""
    if not raw_path.startswith("/") or "#" in raw_path or "?" in raw_path:
        raise InvalidRequest("the request target is not a path")
    if _UPLOAD.fullmatch(raw_path):
        raise MethodUnsupported("a pull-through mirror takes no uploads")
    if broken := _BROKEN.fullmatch(raw_path):
        if broken["kind"] == "manifests" and ":" not in broken["rest"]:
            raise TagInvalid("not a tag")
        raise DigestInvalid("not a sha256 or sha512 digest")
    if raw_path.startswith("/v2/") and _SUSPICIOUS.search(raw_path):
        raise NameInvalid("not a repository name")
    raise NotFound("no such path")
