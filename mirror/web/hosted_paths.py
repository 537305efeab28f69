"""Parse a request that pushes or deletes into one typed request. A pure function.

Lives here: the paths and queries of "Push" and "Content Management" (Distribution specification).
Must not know: aiohttp, how a request is served, requests that only read (``paths.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import parse_qsl

from mirror.oci.errors import (
    DigestInvalid,
    InvalidRequest,
    MethodUnsupported,
    NameInvalid,
    NotFound,
    TagInvalid,
    UploadInvalid,
)
from mirror.oci.reference import ALGORITHMS, Digest, Reference, Repository, Tag, parse_reference
from mirror.web.paths import decode_part

PUSH_LISTENER_METHODS: Final = ("GET", "HEAD", "POST", "PATCH", "PUT", "DELETE")
"""Methods of the push listener."""
_MAX_PUSH_PARAMETERS: Final = 64
"""Parameters in one query. The specification asks for at least 10 tags."""
# Greedy: a repository may have components named "blobs" or "manifests", so the last one counts.
_UPLOADS: Final = re.compile(r"/v2/(?P<name>[^?#]*)/blobs/uploads(?:/(?P<id>[^/?#]*))?")
_CONTENT: Final = re.compile(r"/v2/(?P<name>[^?#]*)/(?P<kind>blobs|manifests)/(?P<ref>[^/?#]*)")


@dataclass(frozen=True, slots=True)
class StartUpload:
    """``POST …/blobs/uploads/``: begin an upload, mount a blob, or push one with its body."""

    repository: Repository
    digest: Digest | None
    """The body is a whole blob of this digest. None: no body follows."""
    mount: Digest | None
    """A blob to take from another repository. None: none."""
    source: str | None
    """The path of that repository, not checked. None: the client names none."""
    algorithm: str
    """The algorithm of the digest at the end, as far as the client says."""


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """Any request about a running upload."""

    repository: Repository
    id: str
    """As the client has sent it. It may be anything."""
    digest: Digest | None
    """Of a ``PUT``: the digest of the whole blob."""


@dataclass(frozen=True, slots=True)
class ManifestChange:
    """``PUT`` or ``DELETE`` of a manifest."""

    repository: Repository
    reference: Reference
    tags: tuple[Tag, ...]
    """Tags in the query of a ``PUT``."""


@dataclass(frozen=True, slots=True)
class BlobDeletion:
    """``DELETE`` of a blob."""

    repository: Repository
    digest: Digest


PushRequest: TypeAlias = StartUpload | UploadRequest | ManifestChange | BlobDeletion


def parse_push(method: str, path: str, query: str, name: str) -> PushRequest | None:
    """Parse the request line of a request that changes something, or is about an upload.

    Args:
        method: As sent.
        path: The request target up to the first ``?``, as sent.
        query: The rest of the request target, without the ``?``, as sent.
        name: The name of the hosted repositories' host.

    Returns:
        None if the request only reads: ``paths.py`` parses it.

    Raises:
        MethodUnsupported: The path does not have this method.
        NotFound: No such path.
        InvalidRequest: A part violates its grammar.
    """
    match = _UPLOADS.fullmatch(path)
    if match is None and method in ("GET", "HEAD"):
        return None
    if method not in PUSH_LISTENER_METHODS:
        raise MethodUnsupported("this method is not supported", allowed=PUSH_LISTENER_METHODS)
    if "#" in query or not path.startswith("/v2/"):
        raise NotFound("no such path")
    parameters = _parse_query(query)
    if match is not None:
        repository = Repository.parse(name, decode_part(match["name"], NameInvalid))
        return _parse_upload(method, repository, match["id"] or "", parameters)
    match = _CONTENT.fullmatch(path)
    if match is None and path.startswith("/v2/") and "/tags/" in path:
        raise NotFound("no such path: a tag is pushed and deleted at /v2/NAME/manifests/TAG")
    if match is None:
        raise NotFound("no such path")
    repository = Repository.parse(name, decode_part(match["name"], NameInvalid))
    reference = match["ref"]
    if match["kind"] == "blobs":
        _require(method, "GET", "HEAD", "DELETE")
        return BlobDeletion(repository, Digest.parse(decode_part(reference, DigestInvalid)))
    _require(method, "GET", "HEAD", "PUT", "DELETE")
    error = DigestInvalid if ":" in reference or "%3a" in reference.lower() else TagInvalid
    tags = tuple(dict.fromkeys(Tag.parse(value) for value in parameters.get("tag", ())))
    parsed = parse_reference(decode_part(reference, error))
    if tags and isinstance(parsed, Tag):
        raise InvalidRequest("tags in the query need a digest in the path")
    return ManifestChange(repository, parsed, tags)


def _parse_upload(
    method: str, repository: Repository, upload_id: str, parameters: dict[str, list[str]]
) -> PushRequest:
    digest = _parse_digest(parameters, "digest")
    if upload_id:
        _require(method, "GET", "PATCH", "PUT", "DELETE")
        if method == "PUT" and digest is None:
            raise DigestInvalid("the query must have the digest of the blob")
        return UploadRequest(repository, upload_id, digest)
    _require(method, "POST")
    algorithm = _first(parameters, "digest-algorithm") or "sha256"
    if algorithm not in ALGORITHMS:
        raise UploadInvalid("digest-algorithm must be sha256 or sha512")
    return StartUpload(
        repository,
        digest=digest,
        mount=_parse_digest(parameters, "mount"),
        source=_first(parameters, "from"),
        algorithm=algorithm if digest is None else digest.algorithm,
    )


def _require(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise MethodUnsupported("this path does not have this method", allowed=allowed)


def _parse_query(query: str) -> dict[str, list[str]]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=_MAX_PUSH_PARAMETERS)
    except ValueError:
        raise InvalidRequest("the query has too many parameters") from None
    parameters: dict[str, list[str]] = {}
    for name, value in pairs:
        parameters.setdefault(name, []).append(value)
    for name in ("digest", "mount", "from"):
        if len(set(parameters.get(name, ()))) > 1:
            # A proxy in front of the server may read another one of them.
            raise InvalidRequest(f"the query has {name} more than once")
    return parameters


def _first(parameters: dict[str, list[str]], name: str) -> str | None:
    return parameters[name][0] if name in parameters else None


def _parse_digest(parameters: dict[str, list[str]], name: str) -> Digest | None:
    text = _first(parameters, name)
    return None if text is None else Digest.parse(text)


# Content-Range of a chunk (Distribution, "Pushing a blob in chunks"): ^[0-9]+-[0-9]+$
_CHUNK: Final = re.compile(r"(?:bytes[ =])?([0-9]{1,18})-([0-9]{1,18})(?:/(?:[0-9]{1,18}|\*))?")


def parse_chunk_range(header: str | None) -> tuple[int, int] | None:
    """Return the first byte and the length of a chunk. None without the field.

    Some clients send the form of HTTP, ``bytes 0-9/10``.

    Raises :class:`UploadInvalid`.
    """
    if header is None:
        return None
    match = _CHUNK.fullmatch(header.strip(" \t"))
    if match is None:
        raise UploadInvalid("Content-Range must be the first and the last byte, such as 0-1023")
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise UploadInvalid("Content-Range must not end before it begins")
    return first, last + 1 - first
