"""Parse a request line into one typed request. A pure function.

Lives here: the paths of the Distribution specification ("Endpoints"), and the choice of the
upstream. Must not know: aiohttp, how a request is served.

The parser works on the raw path, as it was sent. It splits the path first, then percent-decodes
each part once, and then checks the part against its grammar. So an encoded slash or dot never
changes the structure, and every part that later names a file is a digest or a name that the
specification allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
from mirror.oci.reference import (
    Digest,
    Reference,
    Repository,
    Tag,
    parse_reference,
)
from mirror.oci.text import printable


@dataclass(frozen=True, slots=True)
class PingRequest:
    """``/v2/``: the API version check (Distribution, "Determining Support")."""


@dataclass(frozen=True, slots=True)
class HealthRequest:
    """``/healthz``: liveness. The response is always 200."""


@dataclass(frozen=True, slots=True)
class ReadyRequest:
    """``/readyz``: readiness. The response is 503 while the process drains, otherwise 200."""


@dataclass(frozen=True, slots=True)
class MetricsRequest:
    """``/metrics``: metrics for Prometheus."""


@dataclass(frozen=True, slots=True)
class RootRequest:
    """``/``: the default probe of many load balancers. The response is always 200."""


@dataclass(frozen=True, slots=True)
class RepositoriesRequest:
    """``/v2/_catalog``: one page of the repositories that have a manifest on disk."""

    count: int | None
    """Largest number of names on the page. None: the client sets no limit."""
    last: str
    """The page begins after this name. Empty: it is the first page."""
    ns: str | None
    """Only repositories of this upstream, as ``library/alpine``. None: the repositories of all
    upstreams, as ``docker.io/library/alpine``."""
    is_at_push_listener: bool = False
    """Whether ``ns`` comes from the listener, and not from the request."""


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """A manifest, by tag or by digest."""

    repository: Repository
    reference: Reference
    ns: str | None
    """Upstream in the query parameter ``ns``, for ``OCI-Namespace``. None: not in the query."""


@dataclass(frozen=True, slots=True)
class BlobRequest:
    """A blob, by digest. ``ns``: see :class:`ManifestRequest`."""

    repository: Repository
    digest: Digest
    ns: str | None


@dataclass(frozen=True, slots=True)
class TagsRequest:
    """One page of the tags of a repository. ``ns``: see :class:`ManifestRequest`."""

    repository: Repository
    count: int | None
    """Largest number of tags on the page. None: the client sets no limit."""
    last: str | None
    """The page begins after this tag. None: it begins with the first tag."""
    ns: str | None
    prefix: str
    """Upstream in the path, such as ``docker.io/``, for ``Link``. Empty: not in the path."""


@dataclass(frozen=True, slots=True)
class ReferrersRequest:
    """The referrers of a manifest. ``ns``: see :class:`ManifestRequest`."""

    repository: Repository
    digest: Digest
    artifact_type: str | None
    """Only referrers of this type. None: all."""
    last: str | None
    """The page begins after this digest. None: it is the first page."""
    ns: str | None
    prefix: str
    """See :class:`TagsRequest`."""


RepositoryRequest: TypeAlias = ManifestRequest | BlobRequest | TagsRequest | ReferrersRequest
Request: TypeAlias = (
    RepositoryRequest
    | RepositoriesRequest
    | RootRequest
    | PingRequest
    | HealthRequest
    | ReadyRequest
    | MetricsRequest
)

METHODS: Final = ("GET", "HEAD")
"""Methods that a pull-through mirror supports."""

_FIXED: Final[dict[str, Request]] = {
    "/": RootRequest(),
    "/v2/": PingRequest(),
    "/v2": PingRequest(),
    "/healthz": HealthRequest(),
    "/readyz": ReadyRequest(),
    "/metrics": MetricsRequest(),
}

_CATALOG_PATH: Final = "/v2/_catalog"
# RFC 9112, section 3.2.2: absolute-form = absolute-URI
_ABSOLUTE: Final = re.compile(r"https?://[^/?#]+(?P<rest>.*)", re.ASCII | re.IGNORECASE | re.DOTALL)
# Greedy: a repository may have components named "manifests" or "blobs", so the last one counts.
_PATH: Final = re.compile(
    r"/v2/(?P<name>[^?#]*)/"
    r"(?:(?P<kind>manifests|blobs|referrers)/(?P<reference>[^/?#]*)|tags/list)"
)
# A path that does not match is an error. The next patterns choose which one.
_UPLOAD: Final = re.compile(r"/v2/.*/blobs/uploads(?:/.*)?", re.DOTALL)
_BROKEN: Final = re.compile(r"/v2/.*?/(?P<kind>manifests|blobs|referrers)/(?P<rest>.*)", re.DOTALL)
_SUSPICIOUS: Final = re.compile(r"//|[%\\]|/\.{1,2}(?:/|\Z)|[^!-~]")
_ENCODED_SLASH: Final = re.compile(r"%2f", re.IGNORECASE)
_COUNT: Final = re.compile(r"[0-9]{1,9}", re.ASCII)

_NO_PUSH: Final = (
    "this listener is read-only: push to the upstream registry, or to the push listener of the"
    " mirror (hosted.listen or hosted.hosts)"
)
_HUB: Final = "docker.io"
# The first component of a path that is a registry, by the rule of Docker: it has a dot or a port.
# Of the registries, only Docker Hub is known to have no such name of its own.
_REGISTRY: Final = re.compile(
    r"localhost|[a-z0-9-]+(?:\.[a-z0-9-]+)+(?::[0-9]+)?|[a-z0-9-]+:[0-9]+"
)
_MAX_REGISTRY_CHARS: Final = 255
"""Characters of a registry's name in an error: as many as DNS allows."""
_MAX_QUERY_PARAMETERS: Final = 32
"""Parameters in one query. Clients send three; the limit bounds the work for a hostile query."""
_MAX_CACHED_CHARS: Final = 512
"""Characters of path and query. A longer request is not cached, to bound the cache's memory."""
_MAX_CACHED_REQUESTS: Final = 4096
"""Parsed requests that are kept: with the limit above, a few megabytes."""


def parse(
    method: str,
    raw_path: str,
    query: str,
    *,
    upstreams: Mapping[str, str],
    default: str,
    upstream: str | None = None,
) -> Request:
    """Parse a request line.

    Args:
        method: As sent. Methods are case-sensitive (RFC 9110, section 9.1).
        raw_path: The request target up to the first ``?``, as sent.
        query: The rest of the request target, without the ``?``, as sent.
        upstreams: Each name by which a request may call an upstream, to the upstream's own name.
        default: Upstream of a request that names none.
        upstream: Upstream that the ``Host`` header field stands for. None: it stands for none.

    Raises:
        MethodUnsupported: Another method than ``GET`` and ``HEAD``, or an upload.
        NotFound: No such path.
        NameUnknown: The upstream is not one of ``upstreams``.
        InvalidRequest: A part violates its grammar (``NameInvalid``, ``TagInvalid``,
            ``DigestInvalid``, ``PaginationInvalid``).
    """
    if method not in METHODS:
        raise MethodUnsupported(_NO_PUSH)
    if "#" in query:
        raise InvalidRequest("the request target must not contain a fragment")
    match = _PATH.fullmatch(raw_path)
    if match is None:
        if raw_path == _CATALOG_PATH:
            return _parse_catalog(_parse_query(query), upstreams, upstream)
        return _FIXED.get(raw_path) or _raise_path_error(raw_path)
    name, kind, reference = match.groups()
    parameters = _parse_query(query) if query else {}
    ns = parameters.get("ns")
    named = upstream if ns is None else ns
    repository, prefix = _find_repository(decode_part(name, NameInvalid), named, upstreams, default)
    if kind is None:
        count, last = _parse_count(parameters), _parse_last(parameters)
        return TagsRequest(repository, count=count, last=last, ns=ns, prefix=prefix)
    if kind == "manifests":
        error = DigestInvalid if ":" in reference else TagInvalid
        return ManifestRequest(repository, parse_reference(decode_part(reference, error)), ns)
    if kind == "blobs" and reference == "uploads":
        raise MethodUnsupported(_NO_PUSH)
    digest = Digest.parse(decode_part(reference, DigestInvalid))
    if kind == "blobs":
        return BlobRequest(repository, digest, ns)
    artifact_type, last = _parse_artifact_type(parameters), _parse_last_digest(parameters)
    return ReferrersRequest(repository, digest, artifact_type, last=last, ns=ns, prefix=prefix)


def origin_form(target: str) -> str:
    """Return the path and query of a request target in absolute-form (RFC 9112, section 3.2.2).

    Any other target is returned as it is.
    """
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        return target
    return match["rest"] if match["rest"].startswith("/") else f"/{match['rest']}"


def build_parser(
    upstreams: Mapping[str, str], default: str
) -> Callable[[str, str, str, str | None], Request]:
    """Return :func:`parse` for these upstreams, with a bounded cache of valid requests.

    The arguments of the returned function are ``method``, ``raw_path``, ``query``, ``upstream``.
    """

    def parse_uncached(method: str, raw_path: str, query: str, upstream: str | None) -> Request:
        return parse(
            method, raw_path, query, upstreams=upstreams, default=default, upstream=upstream
        )

    parse_cached = lru_cache(_MAX_CACHED_REQUESTS)(parse_uncached)

    def parse_request(method: str, raw_path: str, query: str, upstream: str | None) -> Request:
        is_short = len(raw_path) + len(query) <= _MAX_CACHED_CHARS
        return (parse_cached if is_short else parse_uncached)(method, raw_path, query, upstream)

    return parse_request


# --- the parts of a request -----------------------------------------------------------------------


def decode_part(raw: str, error: type[InvalidRequest]) -> str:
    """Percent-decode one part of a path. Raises ``error`` for an encoded slash."""
    if "%" not in raw:
        return raw
    if _ENCODED_SLASH.search(raw):
        raise error("the path must not contain an encoded slash (%2F)")
    return unquote(raw, errors="replace")


def _find_repository(
    name: str, named: str | None, upstreams: Mapping[str, str], default: str
) -> tuple[Repository, str]:
    """Return the repository, and the prefix of the path that named its upstream.

    ``named``: the upstream, if the request names it outside of the path. Then the whole path is
    the repository's name.
    """
    first, slash, rest = name.partition("/")
    if named is None and slash and first in upstreams:
        return Repository.parse(upstreams[first], rest), f"{first}/"
    if named is None and slash and default == _HUB and _REGISTRY.fullmatch(first):
        raise _not_configured(first)
    upstream = upstreams.get(default if named is None else named)
    if upstream is None:
        raise _not_configured(default if named is None else named)
    return Repository.parse(upstream, name), ""


def _not_configured(name: str) -> NameUnknown:
    shown = printable(name, _MAX_REGISTRY_CHARS)
    return NameUnknown(f"this mirror is not configured for {shown}: add it to its upstreams")


def _parse_query(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=_MAX_QUERY_PARAMETERS)
    except ValueError:
        raise InvalidRequest("the query has too many parameters") from None
    parameters: dict[str, str] = {}
    for name, value in pairs:
        # A proxy in front of the mirror may read the first or the last value of a repeated
        # parameter. So two values of ns must be equal.
        if parameters.setdefault(name, value) != value and name == "ns":
            raise InvalidRequest("the query names more than one upstream (ns)")
    return parameters


def _parse_count(parameters: dict[str, str]) -> int | None:
    raw = parameters.get("n")
    if raw is None:
        return None
    if not _COUNT.fullmatch(raw):
        raise PaginationInvalid("n must be a number of at most 9 digits")
    return int(raw)


def _parse_last(parameters: dict[str, str]) -> str | None:
    raw = parameters.get("last")
    if not raw:
        return None
    try:
        return Tag.parse(raw).name
    except TagInvalid:
        raise PaginationInvalid("last must be a tag") from None


def _parse_last_digest(parameters: dict[str, str]) -> str | None:
    raw = parameters.get("last")
    try:
        return str(Digest.parse(raw)) if raw else raw
    except DigestInvalid:
        raise PaginationInvalid("last must be a digest") from None


def _parse_catalog(
    parameters: dict[str, str], upstreams: Mapping[str, str], upstream: str | None
) -> RepositoriesRequest:
    named, last = parameters.get("ns", upstream), parameters.get("last", "")
    if named is not None and named not in upstreams:
        raise _not_configured(named)
    if len(last) > _MAX_CACHED_CHARS:
        raise PaginationInvalid("last must be a repository")
    ns = None if named is None else upstreams[named]
    return RepositoriesRequest(count=_parse_count(parameters), last=last, ns=ns)


def _parse_artifact_type(parameters: dict[str, str]) -> str | None:
    # A plus that the client did not encode is decoded to a space, which no media type contains.
    raw = parameters.get("artifactType", "").replace(" ", "+")
    if raw and media_type_of(raw) != raw:
        raise InvalidRequest("artifactType must be a media type")
    return raw or None


def _raise_path_error(raw_path: str) -> NoReturn:
    """Raise the error that fits a path that no pattern matches."""
    if not raw_path.startswith("/") or "#" in raw_path or "?" in raw_path:
        raise InvalidRequest("the request target must be a path")
    if _UPLOAD.fullmatch(raw_path):
        raise MethodUnsupported(_NO_PUSH)
    if broken := _BROKEN.fullmatch(raw_path):
        if broken["kind"] == "manifests" and ":" not in broken["rest"]:
            raise TagInvalid("the tag is malformed")
        raise DigestInvalid("the digest must be sha256 or sha512, with lower-case hex digits")
    if raw_path.startswith("/v2/") and _SUSPICIOUS.search(raw_path):
        raise NameInvalid("the repository name is malformed")
    raise NotFound("no such path")
