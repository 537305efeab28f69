"""Descriptors and manifests (OCI Image specification: descriptor.md, manifest.md, image-index.md).

Lives here: media types, what a manifest refers to, and the referrers of a manifest (Distribution
specification, "Listing Referrers"). Must not know: where manifests are kept.

A manifest is hostile until it is parsed: two readers that disagree about one body are how one
image is checked and another one is run (CVE-2021-41190). So whatever two JSON parsers could read
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

MANIFESTS: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES: Final = frozenset({OCI_INDEX, DOCKER_LIST})

MANIFEST_LIMIT: Final = 4 * 1024 * 1024
"""Bytes of the largest manifest that is accepted (distribution spec: "at least 4 megabytes")."""

DEFAULT_ACCEPT: Final = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*")
"""Asked of an upstream where the client's own ``Accept`` does not matter."""

SIZE_LIMIT: Final = 2**63 - 1
"""The largest size of a descriptor (descriptor.md: "int64")."""

# An escape that may be half of a pair: worth the check that every string can be encoded.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

# Go's decoder takes a key in any case, so ``Layers`` beside ``layers`` are two readings.
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
    """What a manifest says of one thing that it refers to. ``size`` is in bytes."""

    media_type: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest, parsed. ``children`` are manifests, ``blobs`` are a config and layers."""

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
    """Read a manifest of ``content_type``; raises :class:`mirror.oci.errors.ManifestInvalid`.

    The two OCI and the two Docker types are held to their grammar. Any other type is an artifact's
    own: whatever it refers to in the usual fields is listed, and nothing else is asked of it but
    that it is not confused about its type.
    """
    media_type = media_type_of(content_type)
    known = media_type.lower()
    if known in INDEXES or known in MANIFESTS:
        document = _load(body)
        _refuse_confusion(document, known)
        return _parse_known(document, known)
    if len(body) > MANIFEST_LIMIT:
        raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
    opaque = Manifest(media_type, (), (), None, None, ())
    try:
        document = _load(body)
    except ManifestInvalid:
        return opaque
    _refuse_confusion(document, media_type)
    try:
        return _manifest(document, media_type)
    except ManifestInvalid:
        return opaque


def sniff_media_type(body: bytes) -> str:
    """The media type of a manifest whose record was lost: what it says, or what it looks like.

    Never raises; ``application/octet-stream`` for what is neither.
    """
    try:
        document = _load(body)
        _refuse_confusion(document, None)
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
    """The tag that lists the referrers of ``digest`` (specification, "Referrers Tag Schema")."""
    return f"{digest.algorithm[:32]}-{digest.hex[:64]}"


def referrers_index(referrers: Iterable[Referrer] = ()) -> bytes:
    """An OCI index of ``referrers``; without any, the empty one that means "none"."""
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
    """Read a referrers index. Raises :class:`ManifestInvalid`."""
    return tuple(
        Referrer(_descriptor(entry), _text(entry, "artifactType"), _annotations(entry))
        for entry in _referrers_document(body)["manifests"]
    )


def filter_referrers(body: bytes, artifact_type: str) -> bytes:
    """The referrers index ``body`` with the entries of one artifact type only.

    Everything else of the index and of its entries is kept. Raises :class:`ManifestInvalid`.
    """
    document = _referrers_document(body)
    chosen = [
        entry for entry in document["manifests"] if entry.get("artifactType") == artifact_type
    ]
    return _dump({**document, "manifests": chosen})


# --- the parts ----------------------------------------------------------------------------------


def _dump(document: _Json) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _load(body: bytes) -> _Json:
    """One JSON object that every parser reads alike. Raises :class:`ManifestInvalid`."""
    if len(body) > MANIFEST_LIMIT:
        raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
    try:
        document = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
        if _SURROGATE.search(body):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except ValueError as error:  # of the decoder, of UTF-8, of an integer of 4,300 digits
        raise ManifestInvalid("a manifest that is not JSON") from error
    except RecursionError:
        raise ManifestInvalid("a manifest that is nested too deep") from None
    if not isinstance(document, dict):
        raise ManifestInvalid("a manifest that is not a JSON object")
    return document


def _object(pairs: list[tuple[str, Any]]) -> _Json:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ManifestInvalid("a manifest with a key that is there twice")
    return fields


def _constant(name: str) -> NoReturn:
    raise ManifestInvalid(f"a manifest with the number {name}")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ManifestInvalid("a manifest with a number out of range")
    return number


def _refuse_confusion(document: _Json, media_type: str | None) -> None:
    """Raise unless ``document`` can be read as one type only, and as ``media_type`` if given."""
    _refuse_case_variants(document)
    if "manifests" in document and any(name in document for name in _IMAGE_FIELDS):
        raise ManifestInvalid("a manifest that is an index and an image at once")
    declared = document.get("mediaType")
    if media_type is None or declared in (None, ""):  # Go reads null and absence alike
        return
    if not isinstance(declared, str) or declared.lower() != media_type.lower():
        raise ManifestInvalid("a manifest whose mediaType is not its Content-Type")


def _refuse_case_variants(fields: _Json) -> None:
    for name in fields:
        if _FIELDS.get(name.casefold(), name) != name:
            raise ManifestInvalid("a manifest with a field name in the wrong case")


def _parse_known(document: _Json, media_type: str) -> Manifest:
    if media_type in INDEXES:
        if "manifests" not in document or any(name in document for name in _IMAGE_FIELDS):
            raise ManifestInvalid("an index without manifests, or with the fields of an image")
    elif "config" not in document or "manifests" in document or "fsLayers" in document:
        raise ManifestInvalid(
            "an image manifest without config, or with the fields of another type"
        )
    return _manifest(document, media_type)


def _manifest(document: _Json, media_type: str) -> Manifest:
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
    _refuse_confusion(document, OCI_INDEX)
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
    # not isinstance: true is an int in Python, and 1 nowhere else
    if type(size) is not int or not 0 <= size <= SIZE_LIMIT:
        raise ManifestInvalid("a descriptor whose size is not a 64-bit count of bytes")
    if not isinstance(raw, str):
        raise ManifestInvalid("a descriptor without a digest")
    try:
        digest = Digest.parse(raw)
    except DigestInvalid:
        raise ManifestInvalid("a descriptor with a digest that is none") from None
    return Descriptor(media_type_of(_text(entry, "mediaType")), digest, size)


def _text(fields: _Json, name: str) -> str | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ManifestInvalid(f"a manifest whose {name} is not a string")
    return value


def _annotations(fields: _Json) -> tuple[tuple[str, str], ...]:
    """What is text of the annotations; nothing here depends on them, so the rest is no fault."""
    annotations = fields.get("annotations")
    if not isinstance(annotations, dict):
        return ()
    return tuple((key, value) for key, value in annotations.items() if isinstance(value, str))
