"""A manifest and its parts, as an inventory needs them.

Lives here: parsing one manifest with the platforms, the subject and the artifact type in it. Must
not know: where manifests are, or their names.

The parts are those of :func:`mirror.oci.descriptor.parse_manifest`, which serves clients and
evicts, too. Here the same document is read a second time for what only people want to know.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from mirror.inventory.model import (
    ContentType,
    DigestText,
    ManifestPart,
    PartColumns,
    StoredManifest,
)
from mirror.oci.descriptor import (
    INDEX_TYPES,
    Descriptor,
    parse_manifest,
    sniff_media_type,
)
from mirror.oci.descriptor import Manifest as ParsedManifest
from mirror.oci.errors import InvalidRequest, ManifestInvalid
from mirror.oci.headers import OCTET_STREAM
from mirror.oci.reference import Digest
from mirror.store.records import MALFORMED

IMAGE_CONFIG_TYPES: Final = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    }
)
"""Media types of configs that state a platform (OCI image specification, config.md)."""
CONFIG_LIMIT: Final = 4 * 1024 * 1024
"""Bytes of the largest config that is read for its platform. Usual ones have 10 KiB."""
_ATTESTATION_KEY: Final = "vnd.docker.reference.type"
"""Annotation of an entry of an index that is an attestation of another one (BuildKit)."""

# An os or an architecture, as Go names it.
_PLATFORM_WORD: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


def parse_stored(text: DigestText, body: bytes, media_type: str) -> StoredManifest:
    """Parse a manifest. One that is not understood is opaque, and has no parts. Never raises.

    Args:
        text: The digest of ``body``.
        body: The manifest.
        media_type: As a source has stated it. Empty: none has.
    """
    parsed = _parse_as(body, media_type)
    if parsed.is_opaque:
        return StoredManifest(
            text=text,
            media_type=parsed.media_type,
            type=ContentType.MANIFEST,
            columns=PartColumns(),
            is_opaque=True,
        )
    document: dict[str, Any] = json.loads(body)
    subject = _subject(document)
    return StoredManifest(
        text=text,
        media_type=parsed.media_type,
        type=_type_of(parsed, has_subject=subject is not None),
        columns=PartColumns.of(_parts(parsed, document)),
        artifact_type=_text(document.get("artifactType")),
        subject=subject,
    )


def platform_of_config(body: bytes) -> str | None:
    """Return the platform that the config of an image states. None: it states none."""
    try:
        return platform_text(json.loads(body))
    except MALFORMED:
        return None


def platform_text(platform: object) -> str | None:
    """Return ``os/architecture[/variant]`` of a JSON object. None if it has no such fields.

    ``unknown/unknown`` is what BuildKit states for an attestation.
    """
    if not isinstance(platform, dict):
        return None
    words = [platform.get(key) for key in ("os", "architecture")]
    words += [variant] if (variant := platform.get("variant")) else []
    texts = [word for word in words if isinstance(word, str) and _PLATFORM_WORD.fullmatch(word)]
    return "/".join(texts) if texts == words and "unknown" not in texts else None


def _parse_as(body: bytes, media_type: str) -> ParsedManifest:
    for stated in (media_type, sniff_media_type(body)):
        try:
            parsed = parse_manifest(body, stated) if stated else None
        except ManifestInvalid:
            continue
        if parsed is not None and not parsed.is_opaque:
            return parsed
    return ParsedManifest(media_type or OCTET_STREAM, is_opaque=True)


def _type_of(parsed: ParsedManifest, *, has_subject: bool) -> ContentType:
    if has_subject:
        return ContentType.REFERRER
    is_index = parsed.media_type.lower() in INDEX_TYPES or bool(parsed.children)
    return ContentType.INDEX if is_index else ContentType.MANIFEST


def _parts(parsed: ParsedManifest, document: dict[str, Any]) -> tuple[ManifestPart, ...]:
    entries = document.get("manifests") or ()
    by_digest = {entry["digest"]: entry for entry in entries if isinstance(entry, dict)}
    children = [_child(child, by_digest.get(str(child.digest), {})) for child in parsed.children]
    config = document.get("config")
    config_digest = config.get("digest") if isinstance(config, dict) else None
    blobs = [
        _part(
            blob,
            ContentType.CONFIG
            if position == 0 and str(blob.digest) == config_digest
            else ContentType.LAYER,
        )
        for position, blob in enumerate(parsed.blobs)
    ]
    return (*children, *blobs)


def _child(child: Descriptor, entry: dict[str, Any]) -> ManifestPart:
    annotations = entry.get("annotations")
    is_attestation = isinstance(annotations, dict) and _ATTESTATION_KEY in annotations
    if is_attestation or "artifactType" in entry:
        content_type = ContentType.REFERRER
    elif child.media_type.lower() in INDEX_TYPES:
        content_type = ContentType.INDEX
    else:
        content_type = ContentType.MANIFEST
    return _part(child, content_type, platform_text(entry.get("platform")))


def _part(
    descriptor: Descriptor, content_type: ContentType, platform: str | None = None
) -> ManifestPart:
    return ManifestPart(
        text=str(descriptor.digest),
        media_type=descriptor.media_type,
        size=descriptor.size,
        type=content_type,
        platform=platform,
        is_elsewhere=descriptor.is_elsewhere,
    )


def _subject(document: dict[str, Any]) -> DigestText | None:
    subject = document.get("subject")
    try:
        return str(Digest.parse(subject["digest"])) if isinstance(subject, dict) else None
    except (InvalidRequest, LookupError, TypeError):
        return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
