"""Checks of manifests and lists of referrers that a registry has sent.

Lives here: checks of whole bodies, as pure functions. Must not know: requests, endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mirror.oci.descriptor import (
    DOCKER_SCHEMA1_SIGNED,
    SCHEMA1_TYPES,
    parse_manifest,
    parse_referrers,
    payload_of,
    referrers_index,
    sniff_media_type,
)
from mirror.oci.errors import ManifestInvalid, UpstreamProtocolError
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest
from mirror.upstream.api import ManifestBody

_NO_MANIFEST: Final = "the upstream sent no manifest for the tag, but for example a log-in page"


def require_manifest(body: bytes, media_type: str) -> None:
    """Raise ``UpstreamProtocolError`` unless the response for a tag is recognized as a manifest.

    A response without a digest has no other proof: a log-in page comes with status 200, too.
    """
    try:
        parse_manifest(body, media_type)
        is_manifest = {media_type, sniff_media_type(body)} != {OCTET_STREAM}
    except ManifestInvalid as error:
        raise UpstreamProtocolError(f"{_NO_MANIFEST}: {error.message}") from error
    if not is_manifest:
        raise UpstreamProtocolError(_NO_MANIFEST)


def identify_manifest(body: bytes, media_type: str, expected: Digest | None) -> ManifestBody:
    """Return a manifest with its digest, also a signed one of schema 1.

    Raises ``UpstreamProtocolError`` if it does not match ``expected``. None: any digest is right.
    """
    algorithm = expected.algorithm if expected is not None else "sha256"
    digest = of_payload = Digest.of(body, algorithm)
    if media_type == OCTET_STREAM or media_type.lower() in SCHEMA1_TYPES:
        of_payload = Digest.of(payload_of(body), algorithm)
    if expected not in (None, digest, of_payload):
        raise UpstreamProtocolError("the manifest does not match its digest")
    if digest in (of_payload, expected):
        return ManifestBody(digest, media_type, body)
    is_stated = media_type != OCTET_STREAM
    return ManifestBody(of_payload, media_type if is_stated else DOCKER_SCHEMA1_SIGNED, body)


def merge_referrers(pages: Sequence[bytes]) -> bytes:
    """Join referrers indexes to one. Raises ``ManifestInvalid``."""
    return referrers_index([entry for body in pages for entry in parse_referrers(body)])
