"""Find what refers to a manifest: signatures, SBOMs, attestations, on all three channels.

Lives here: the referrers API, the tag of the fallback, and cosign's tags ``.sig``, ``.att`` and
``.sbom``. Must not know: how a manifest is fetched.

Registries and tools use all three side by side: one that has the referrers API may still have the
tags that an older tool wrote. All but the API are tags, and they move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from mirror.observability.events import RequestRecord
from mirror.oci.descriptor import DEFAULT_ACCEPT, parse_referrers, referrers_tag
from mirror.oci.errors import DigestInvalid, ManifestInvalid, NotFound
from mirror.oci.reference import Digest, Repository, Tag
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


async def find_referring(
    service: PullService,
    repository: Repository,
    digest: Digest,
    make_record: Callable[[], RequestRecord],
) -> Referring:
    """Ask for everything that refers to a manifest. Tags that do not exist are passed over.

    Args:
        service: Asks the upstream, or the cache.
        repository: The repository of the manifest.
        digest: The manifest.
        make_record: Returns the record of a new request.

    Raises:
        MirrorError: A channel could not be asked.
    """
    found = await _read(await service.referrers(repository, digest, None, make_record()))
    indexes = []
    fallback = await _find_tag(service, repository, Tag(referrers_tag(digest)), make_record)
    if fallback is not None and fallback.body is not None:
        indexes.append(fallback)
        try:
            found += await _read(fallback.body)
        except ManifestInvalid:
            found.append(fallback.digest)  # Some other manifest has this tag.
    for tag in cosign_tags(digest):
        manifest = await _find_tag(service, repository, tag, make_record)
        if manifest is not None:
            found.append(manifest.digest)
    chosen = tuple(dict.fromkeys(found))[:_MAX_REFERRERS]
    return Referring(chosen, tuple(indexes))


async def _find_tag(
    service: PullService,
    repository: Repository,
    tag: Tag,
    make_record: Callable[[], RequestRecord],
) -> ManifestResult | None:
    try:
        return await service.manifest(repository, tag, DEFAULT_ACCEPT, make_record(), is_head=False)
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
