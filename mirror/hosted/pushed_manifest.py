"""Which manifests are accepted, and what is learned from one that is pushed.

Lives here: the checks of a pushed manifest's bytes (Distribution, "Pushing Manifests"). Must not
know: which content a repository has.

The bytes are kept as they are. A body that two programs could read differently is refused: one
would check another image than the other one runs (CVE-2021-41190).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from mirror.oci.descriptor import (
    IMAGE_MANIFEST_TYPES,
    OCI_MANIFEST,
    SCHEMA1_TYPES,
    Manifest,
    parse_manifest,
    sniff_media_type,
)
from mirror.oci.errors import DigestInvalid, ManifestInvalid, ManifestRefused
from mirror.oci.headers import OCTET_STREAM, manifest_type_of, media_type_of
from mirror.oci.reference import Digest

_NON_DISTRIBUTABLE: Final = ("nondistributable", "foreign")
"""In the media types of layers that a registry need not have (OCI Image specification, layer.md,
"Non-Distributable Layers"; Docker's ``foreign``)."""


@dataclass(frozen=True, slots=True)
class PushedManifest:
    """A manifest whose bytes are accepted."""

    digest: Digest
    media_type: str
    size: int
    """Bytes."""
    image_size: int | None
    """Bytes of it and of the blobs that it lists, each once, as it states them. None: it is an
    index, whose children have sizes of their own."""
    children: tuple[Digest, ...]
    """Manifests that it lists. Its repository must have them."""
    blobs: tuple[Digest, ...]
    """Blobs that it lists."""
    required_blobs: tuple[Digest, ...]
    """Blobs that its repository must have. A layer may be elsewhere."""
    subject: Digest | None
    artifact_type: str
    """As the list of referrers has it: the type of the config if it states none."""
    annotations: dict[str, str]


def read_pushed_manifest(body: bytes, content_type: str | None, digest: Digest) -> PushedManifest:
    """Check and read a manifest.

    Args:
        body: Its bytes.
        content_type: ``Content-Type`` of the request. None, or a generic type: the manifest states
            its type itself.
        digest: The digest of ``body``.

    Raises:
        ManifestRefused: It is no manifest that can be accepted. The message says why.
    """
    try:
        stated = manifest_type_of(content_type)
        media_type = sniff_media_type(body) if stated == OCTET_STREAM else stated
        if media_type == OCTET_STREAM:
            raise ManifestRefused(
                "the media type is not known: send that of the manifest as Content-Type, such as"
                f" {OCI_MANIFEST}, or state it as mediaType"
            )
        parsed = parse_manifest(body, media_type)
        document = json.loads(body)
    except (ManifestInvalid, ValueError, RecursionError) as error:
        reason = error.message if isinstance(error, ManifestInvalid) else "not valid JSON"
        raise ManifestRefused(reason) from None
    if media_type.lower() in SCHEMA1_TYPES:
        raise ManifestRefused("manifests of schema 1 are not accepted: push the image as OCI")
    if parsed.is_opaque:
        raise ManifestRefused(_why_opaque(document, media_type))
    if media_type.lower() in IMAGE_MANIFEST_TYPES and "config" not in document:
        raise ManifestRefused("the manifest of an image needs a config")
    return PushedManifest(
        digest=digest,
        media_type=media_type,
        size=len(body),
        image_size=_image_size(parsed, len(body)),
        children=tuple(child.digest for child in parsed.children),
        blobs=tuple(blob.digest for blob in parsed.blobs),
        required_blobs=_required_blobs(parsed),
        subject=_subject(document),
        artifact_type=_artifact_type(document, media_type),
        annotations=_annotations(document),
    )


def _why_opaque(document: Any, media_type: str) -> str:
    if not isinstance(document, dict):
        return "the manifest is not a JSON object"
    declared = document.get("mediaType")
    if isinstance(declared, str) and declared and declared.lower() != media_type.lower():
        return "the mediaType of the manifest is not the Content-Type of the request"
    return "the manifest does not suit its media type, or can be read in more than one way"


def _image_size(parsed: Manifest, size: int) -> int | None:
    if parsed.children:
        return None
    return size + sum({blob.digest: blob.size for blob in parsed.blobs}.values())


def _required_blobs(parsed: Manifest) -> tuple[Digest, ...]:
    return tuple(
        blob.digest
        for blob in parsed.blobs
        if not blob.is_elsewhere
        and not any(word in blob.media_type.lower() for word in _NON_DISTRIBUTABLE)
    )


def _subject(document: dict[str, Any]) -> Digest | None:
    subject = document.get("subject")
    if subject is None:
        return None
    if not isinstance(subject, dict) or not isinstance(subject.get("digest"), str):
        raise ManifestRefused("the subject of the manifest is no descriptor")
    try:
        return Digest.parse(subject["digest"])
    except DigestInvalid as error:
        raise ManifestRefused(f"the subject of the manifest has {error.message}") from None


def _artifact_type(document: dict[str, Any], media_type: str) -> str:
    stated = document.get("artifactType")
    config = document.get("config")
    is_image = media_type.lower() in IMAGE_MANIFEST_TYPES
    if not stated and is_image and isinstance(config, dict):
        stated = config.get("mediaType")
    is_type = isinstance(stated, str) and media_type_of(stated) == stated
    return stated if is_type and isinstance(stated, str) else ""


def _annotations(document: dict[str, Any]) -> dict[str, str]:
    found = document.get("annotations")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ManifestRefused("the annotations of the manifest are not text")
    return found
