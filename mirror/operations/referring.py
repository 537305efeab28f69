"""Find what refers to a manifest: signatures, SBOMs, attestations, on all three channels.

Lives here: the referrers API, the tag of the fallback, and cosign's tags ``.sig``, ``.att`` and
``.sbom``. Must not know: how a manifest is fetched.

Registries and tools use all three side by side: one that has the referrers API may still have the
tags that an older tool wrote. All but the API are tags, and they move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mirror.observability.events import Kind
from mirror.oci.descriptor import DEFAULT_ACCEPT, parse_referrers, referrers_tag
from mirror.oci.errors import DigestInvalid, ManifestInvalid, NotFound
from mirror.oci.reference import Digest, Tag
from mirror.operations.own_requests import OwnRequests
from mirror.pull.results import ManifestResult
from mirror.pull.service import PullService
from mirror.threads import parse_in_thread_if_large

COSIGN_SUFFIXES: Final = (".sig", ".att", ".sbom")
"""Ends of the tags that cosign writes: signatures, attestations, SBOMs."""
_MAX_REFERRERS: Final = 1000
"""Referrers of one manifest that are followed. Anybody who may push can add some."""


@dataclass(frozen=True, slots=True)
class Referring:
    """The manifests that refer to one manifest."""

    referrers: tuple[Digest, ...]
    """Manifests, each once."""
    indexes: tuple[ManifestResult, ...]
    """The indexes at the tag of the fallback: they are on disk now, and list ``referrers``."""


def cosign_tags(digest: Digest) -> tuple[Tag, ...]:
    """Return the tags at which cosign keeps what belongs to a manifest."""
    stem = referrers_tag(digest)
    return tuple(Tag(f"{stem}{suffix}") for suffix in COSIGN_SUFFIXES)


async def find_referring(service: PullService, requests: OwnRequests, digest: Digest) -> Referring:
    """Ask for everything that refers to a manifest. Tags that do not exist are passed over.

    Args:
        service: Asks the upstream, or the cache.
        requests: Those for the repository of the manifest.
        digest: The manifest.

    Raises:
        MirrorError: A channel could not be asked.
    """
    with requests.begin(Kind.REFERRERS, digest) as pull:
        page = await service.referrers(requests.repository, digest, None, pull)
        found = await _read(page.index)
        while page.next_last is not None and len(found) < _MAX_REFERRERS:
            last = page.next_last
            page = await service.referrers(requests.repository, digest, None, pull, last)
            found += await _read(page.index)
    indexes = []
    fallback = await _find_tag(service, requests, Tag(referrers_tag(digest)))
    if fallback is not None and fallback.body is not None:
        indexes.append(fallback)
        try:
            found += await _read(fallback.body)
        except ManifestInvalid:
            found.append(fallback.digest)  # Some other manifest has this tag.
    for tag in cosign_tags(digest):
        manifest = await _find_tag(service, requests, tag)
        if manifest is not None:
            found.append(manifest.digest)
    chosen = tuple(dict.fromkeys(found))[:_MAX_REFERRERS]
    return Referring(chosen, tuple(indexes))


async def _find_tag(service: PullService, requests: OwnRequests, tag: Tag) -> ManifestResult | None:
    try:
        with requests.begin(Kind.MANIFEST, tag) as pull:
            return await service.manifest(
                requests.repository, tag, DEFAULT_ACCEPT, pull, is_head=False
            )
    except NotFound:
        return None


async def _read(body: bytes) -> list[Digest]:
    """Return the digests of a list of referrers. Raises ``ManifestInvalid``."""
    entries: list[Any] = await parse_in_thread_if_large(parse_referrers, body)
    found = []
    for entry in entries:
        try:
            found.append(Digest.parse(str(entry.get("digest"))))
        except (DigestInvalid, AttributeError):
            continue
    return found
