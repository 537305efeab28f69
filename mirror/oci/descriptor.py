"""Descriptors and manifests (OCI Image specification: descriptor.md, manifest.md, image-index.md).

Lives here: media types, the blobs and manifests that a manifest refers to, and the list of a
manifest's referrers (Distribution specification, "Listing Referrers"). Must not know: where
manifests are stored.

A manifest is untrusted until it is parsed. If two programs read one body differently, one image is
checked and another one is run (CVE-2021-41190). So a body that two JSON parsers could read
differently is refused, and ``urls`` of a descriptor are never read (CVE-2020-15157).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

from mirror.oci.errors import DigestInvalid, ManifestInvalid
from mirror.oci.headers import OCTET_STREAM, media_type_of
from mirror.oci.reference import Digest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA1: Final = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"

IMAGE_MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})

MANIFEST_LIMIT: Final = 4 * 1024 * 1024
"""Bytes of the largest manifest that is accepted (Distribution: "at least 4 megabytes")."""

DEFAULT_ACCEPT: Final = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*")
"""``Accept`` of a request to an upstream if the client sent none, or if the mirror requests content
for itself."""

MAX_DESCRIPTOR_SIZE: Final = 2**63 - 1
"""Bytes; the largest size in a descriptor (descriptor.md: "int64")."""

# An escape that may be half of a surrogate pair. Only such a body is checked for lone halves.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

# Go's decoder ignores the case of a key, so it could read ``Layers`` in place of ``layers``.
_FIELDS: Final = {
    name.casefold(): name
    for name in (
        *("schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests"),
        *("fsLayers", "blobs", "subject", "annotations", "digest", "size"),
    )
}
_IMAGE_FIELDS: Final = ("config", "layers", "fsLayers")

_Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The type, digest and size (in bytes) of content that a manifest refers to."""

    media_type: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest. ``children``: manifests (of an index); ``blobs``: config and layers."""

    media_type: str
    children: tuple[Descriptor, ...]
    blobs: tuple[Descriptor, ...]
    subject: Descriptor | None
    artifact_type: str | None
    annotations: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Referrer:
    """One entry of a referrers index."""

    descriptor: Descriptor
    artifact_type: str | None = None
    annotations: tuple[tuple[str, str], ...] = ()


def parse_manifest(body: bytes, content_type: str) -> Manifest:
    """Parse a manifest of ``content_type``. Raises :class:`ManifestInvalid`.

    The two OCI and the two Docker types are checked against their specifications. Any other type is
    that of an artifact: descriptors in the usual fields are listed, and the body may have any form,
    as long as it does not contradict its type.
    """
    media_type = media_type_of(content_type)
    known = media_type.lower()
    if known in INDEX_TYPES or known in IMAGE_MANIFEST_TYPES:
        document = _load(body)
        _check_type(document, known)
        return _parse_known(document, known)
    if len(body) > MANIFEST_LIMIT:
        raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
    opaque = Manifest(media_type, (), (), None, None, ())
    try:
        document = _load(body)
    except ManifestInvalid:
        return opaque
    _check_type(document, media_type)
    try:
        return _to_manifest(document, media_type)
    except ManifestInvalid:
        return opaque


def sniff_media_type(body: bytes) -> str:
    """Guess the media type of a manifest whose record was lost. Never raises.

    The result is its ``mediaType``, else the type that its fields indicate, else
    ``application/octet-stream``.
    """
    try:
        document = _load(body)
        _check_type(document, None)
    except ManifestInvalid:
        return OCTET_STREAM
    declared = document.get("mediaType")
    if isinstance(declared, str) and media_type_of(declared) == declared:
        return declared
    if "fsLayers" in document:
        return DOCKER_SCHEMA1_SIGNED if "signatures" in document else DOCKER_SCHEMA1
    if "manifests" in document:
        return OCI_INDEX
    return OCI_MANIFEST if "config" in document else OCTET_STREAM


def referrers_tag(digest: Digest) -> str:
    """Return the tag of the list of referrers (Distribution, "Referrers Tag Schema")."""
    return f"{digest.algorithm[:32]}-{digest.hex[:64]}"


def referrers_index(referrers: Iterable[Referrer] = ()) -> bytes:
    """Return an OCI index of ``referrers``. An index without entries means that there are none."""
    entries: list[_Json] = []
    for referrer in referrers:
        entry: _Json = {
            "mediaType": referrer.descriptor.media_type,
            "digest": str(referrer.descriptor.digest),
            "size": referrer.descriptor.size,
        }
        if referrer.artifact_type:
            entry["artifactType"] = referrer.artifact_type
        if referrer.annotations:
            entry["annotations"] = dict(referrer.annotations)
        entries.append(entry)
    return _dump({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})


def parse_referrers(body: bytes) -> tuple[Referrer, ...]:
    """Parse a referrers index. Raises :class:`ManifestInvalid`."""
    return tuple(
        Referrer(_descriptor(entry), _text(entry, "artifactType"), _annotations(entry))
        for entry in _referrers_document(body)["manifests"]
    )


def filter_referrers(body: bytes, artifact_type: str) -> bytes:
    """Return the referrers index ``body`` with the entries of one artifact type only.

    All other fields of the index and of its entries are kept. Raises :class:`ManifestInvalid`.
    """
    document = _referrers_document(body)
    chosen = [
        entry for entry in document["manifests"] if entry.get("artifactType") == artifact_type
    ]
    return _dump({**document, "manifests": chosen})


# --- parsing ------------------------------------------------------------------------------------


def _dump(document: _Json) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _load(body: bytes) -> _Json:
    """Parse a JSON object that every parser reads alike. Raises :class:`ManifestInvalid`."""
    if len(body) > MANIFEST_LIMIT:
        raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
    try:
        document = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_fields,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if _SURROGATE.search(body):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except ValueError as error:  # bad JSON, bad UTF-8, or an integer of more than 4300 digits
        raise ManifestInvalid("a manifest that is not JSON") from error
    except RecursionError:
        raise ManifestInvalid("a manifest that is nested too deeply") from None
    if not isinstance(document, dict):
        raise ManifestInvalid("a manifest that is not a JSON object")
    return document


def _unique_fields(pairs: list[tuple[str, Any]]) -> _Json:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ManifestInvalid("a manifest with a duplicate key")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ManifestInvalid(f"a manifest with the number {name}")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ManifestInvalid("a manifest with a number out of range")
    return number


def _check_type(document: _Json, media_type: str | None) -> None:
    """Raise unless ``document`` can be read as one type only, and as ``media_type`` if given."""
    _refuse_case_variants(document)
    if "manifests" in document and any(name in document for name in _IMAGE_FIELDS):
        raise ManifestInvalid("a manifest that is an index and an image at once")
    declared = document.get("mediaType")
    if media_type is None or declared in (None, ""):  # Go does not tell null from absence
        return
    if not isinstance(declared, str) or declared.lower() != media_type.lower():
        raise ManifestInvalid("a manifest whose mediaType differs from its Content-Type")


def _refuse_case_variants(fields: _Json) -> None:
    for name in fields:
        if _FIELDS.get(name.casefold(), name) != name:
            raise ManifestInvalid("a manifest with a field name in the wrong case")


def _parse_known(document: _Json, media_type: str) -> Manifest:
    if media_type in INDEX_TYPES:
        if "manifests" not in document or any(name in document for name in _IMAGE_FIELDS):
            raise ManifestInvalid("an index without manifests, or with the fields of an image")
    elif "config" not in document or "manifests" in document or "fsLayers" in document:
        raise ManifestInvalid(
            "an image manifest without config, or with the fields of another type"
        )
    return _to_manifest(document, media_type)


def _to_manifest(document: _Json, media_type: str) -> Manifest:
    config = document.get("config")
    subject = document.get("subject")
    return Manifest(
        media_type=media_type,
        children=_descriptors(document, "manifests"),
        # "blobs": the OCI artifact manifest of the 1.1 release candidates
        blobs=(() if config is None else (_descriptor(config),))
        + _descriptors(document, "layers")
        + _descriptors(document, "blobs"),
        subject=None if subject is None else _descriptor(subject),
        artifact_type=_text(document, "artifactType"),
        annotations=_annotations(document),
    )


def _referrers_document(body: bytes) -> _Json:
    document = _load(body)
    _check_type(document, OCI_INDEX)
    _parse_known(document, OCI_INDEX)
    return {**document, "manifests": document["manifests"] or []}


def _descriptors(document: _Json, field: str) -> tuple[Descriptor, ...]:
    entries = document.get(field)
    if entries is None:  # Go writes an empty list as null
        return ()
    if not isinstance(entries, list):
        raise ManifestInvalid(f"a manifest whose {field} is not a list")
    return tuple(_descriptor(entry) for entry in entries)


def _descriptor(entry: object) -> Descriptor:
    if not isinstance(entry, dict):
        raise ManifestInvalid("a descriptor that is not an object")
    _refuse_case_variants(entry)
    size, raw = entry.get("size"), entry.get("digest")
    # Not isinstance: in Python, true is an int.
    if type(size) is not int or not 0 <= size <= MAX_DESCRIPTOR_SIZE:
        raise ManifestInvalid("a descriptor whose size is not a 64-bit count of bytes")
    if not isinstance(raw, str):
        raise ManifestInvalid("a descriptor without a digest")
    try:
        digest = Digest.parse(raw)
    except DigestInvalid:
        raise ManifestInvalid("a descriptor with a malformed digest") from None
    return Descriptor(media_type_of(_text(entry, "mediaType")), digest, size)


def _text(fields: _Json, name: str) -> str | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ManifestInvalid(f"a manifest whose {name} is not a string")
    return value


def _annotations(fields: _Json) -> tuple[tuple[str, str], ...]:
    """Return the annotations that are strings. Others are ignored: nothing here depends on them."""
    annotations = fields.get("annotations")
    if not isinstance(annotations, dict):
        return ()
    return tuple((key, value) for key, value in annotations.items() if isinstance(value, str))
