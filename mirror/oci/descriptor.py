"""Descriptors and manifests (OCI Image specification: descriptor.md, manifest.md, image-index.md).

Lives here: media types, the blobs and manifests that a manifest refers to, and the list of a
manifest's referrers (Distribution specification, "Listing Referrers"). Must not know: where
manifests are stored.

A manifest is the upstream's bytes, and is passed on unchanged. It is parsed only to learn its
parts. If two programs read one body differently, one image is checked and another one is run
(CVE-2021-41190). So no part is learned from a body that two parsers could read differently, or that
does not suit its type. ``urls`` of a descriptor are never kept (CVE-2020-15157).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Any, Final, TypeAlias

from mirror.oci.errors import DigestInvalid, ManifestInvalid, WholeManifestNeeded
from mirror.oci.headers import OCTET_STREAM, manifest_type_of, media_type_of
from mirror.oci.reference import Digest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA1: Final = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"

OCI_ARTIFACT: Final = "application/vnd.oci.artifact.manifest.v1+json"
"""Artifact manifest of the release candidates of OCI 1.1. Its parts are in ``blobs``."""

IMAGE_MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
SCHEMA1_TYPES: Final = frozenset({DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED})
MANIFEST_TYPES: Final = IMAGE_MANIFEST_TYPES | INDEX_TYPES | SCHEMA1_TYPES | {OCI_ARTIFACT}
"""The media types of manifests that registries serve under ``/manifests/`` only."""
CHILD_TYPES: Final = MANIFEST_TYPES | {""}
"""Media types of the entries of an index that are manifests. Empty: the entry states no type."""

MANIFEST_LIMIT: Final = 4 * 1024 * 1024
"""Bytes of the largest manifest that is accepted (Distribution: "at least 4 megabytes")."""

_MAX_NESTED: Final = 100_000
"""Objects and lists of a manifest. The largest one that has only descriptors has 40,000. Without a
limit, a manifest of 4 MiB could need 100 MiB of memory, for a moment."""

DEFAULT_ACCEPT: Final = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*")
"""``Accept`` of a request to an upstream if the client sent none, or if the mirror requests content
for itself."""

MAX_DESCRIPTOR_SIZE: Final = 2**63 - 1
"""Bytes; the largest size in a descriptor (descriptor.md: "int64")."""

# An escape that may be half of a surrogate pair. Only such a body is checked for lone halves.
_REFERRERS_TAG: Final = re.compile(r"(sha(?:256|512)-[0-9a-f]{64})(?:\..*)?", re.ASCII)
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

# Go's decoder ignores the case of a key, so it could read ``Layers`` in place of ``layers``.
_FIELDS: Final = {
    name.casefold(): name
    for name in (
        *("schemaVersion", "mediaType", "artifactType", "config", "layers", "manifests", "blobs"),
        *("fsLayers", "subject", "annotations", "digest", "size", "urls", "data", "platform"),
        *("architecture", "os", "os.version", "os.features", "variant", "features"),
    )
}
"""Casefolded key -> the key, of all that Go's tools read in a manifest, in a descriptor, and in a
platform."""
_IMAGE_FIELDS: Final = ("config", "layers", "fsLayers")
_PARTS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(IMAGE_MANIFEST_TYPES, ("config", "layers")),
    **dict.fromkeys(INDEX_TYPES, ("manifests",)),
    **dict.fromkeys(SCHEMA1_TYPES, ()),
    OCI_ARTIFACT: ("blobs",),
}
"""Media type -> the fields with its parts. When a manifest is pushed, a registry checks that it has
these parts. In any other field, everybody who may push can write the digest of other content."""
_ALL_PARTS: Final = ("config", "layers", "blobs", "manifests")
"""The fields with the parts of other types, whose specifications are not known here."""

_Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The type, digest and size (in bytes) of content that a manifest refers to.

    The author of the manifest chose all three, so the type and the size are only hints.
    """

    media_type: str
    """Empty if the descriptor states none."""
    digest: Digest
    size: int
    is_elsewhere: bool = False
    """Whether it has ``urls``. Then a registry need not have the content (OCI Image specification,
    "Non-Distributable Layers"), and does not check that it has."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest, as far as it is understood."""

    media_type: str
    """``Content-Type`` for clients. Never a generic type, except ``application/octet-stream``."""
    children: tuple[Descriptor, ...] = ()
    """Manifests that it refers to."""
    blobs: tuple[Descriptor, ...] = ()
    """Config, layers, and entries of an index whose type is not that of a manifest."""
    is_opaque: bool = False
    """True if its parts are not known: its bytes are not understood as this type."""


class _NotUnderstood(Exception):
    """A document that does not suit its type, or that two parsers could read differently."""


def check_announced(media_type: str, size: int) -> None:
    """Check the headers of a manifest that will be fetched by its digest.

    Raises:
        ManifestInvalid: It has more than :data:`MANIFEST_LIMIT` bytes.
        WholeManifestNeeded: It is of schema 1, or it may be, because it states no type. Then its
            digest may be that of a part of its bytes (see :func:`payload_of`).
    """
    if size > MANIFEST_LIMIT:
        raise ManifestInvalid(f"a manifest of {size} bytes")
    if media_type == OCTET_STREAM or media_type.lower() in SCHEMA1_TYPES:
        raise WholeManifestNeeded("a manifest that has to be fetched in one piece")


def parse_manifest(body: bytes, content_type: str) -> Manifest:
    """Parse a manifest that was sent with ``content_type``.

    A generic ``content_type`` is replaced by the ``mediaType`` of the body. Content that is not
    understood gives an opaque manifest.

    Raises:
        ManifestInvalid: The body has more than :data:`MANIFEST_LIMIT` bytes or
            :data:`_MAX_NESTED` objects, or is nested too deeply. Or it is no JSON object, and its
            type is generic or demands one.
    """
    media_type = manifest_type_of(content_type)
    document, is_unambiguous = _load(body)
    if document is None:
        if media_type == OCTET_STREAM or media_type.lower() in MANIFEST_TYPES:
            raise ManifestInvalid("no manifest: the content is not a JSON object")
        return Manifest(media_type, is_opaque=True)
    if media_type == OCTET_STREAM:
        media_type = _declared_type(document)
    try:
        if not is_unambiguous:
            raise _NotUnderstood
        return _to_manifest(document, media_type)
    except _NotUnderstood:
        return Manifest(media_type, is_opaque=True)


def sniff_media_type(body: bytes) -> str:
    """Guess the media type of a manifest whose record was lost. Never raises.

    The result is its ``mediaType``, else the type that its fields indicate, else
    ``application/octet-stream``.
    """
    try:
        document, _ = _load(body)
    except ManifestInvalid:
        return OCTET_STREAM
    if document is None:
        return OCTET_STREAM
    declared = _declared_type(document)
    if declared != OCTET_STREAM:
        return declared
    if "fsLayers" in document:
        return DOCKER_SCHEMA1_SIGNED if "signatures" in document else DOCKER_SCHEMA1
    if "manifests" in document:
        return OCTET_STREAM if _has_image_fields(document) else OCI_INDEX
    return OCI_MANIFEST if "config" in document else OCTET_STREAM


def payload_of(body: bytes) -> bytes:
    """Return the bytes that the digest of a manifest is computed from.

    These are ``body`` itself, except for a signed manifest of schema 1: its digest is that of the
    manifest without its signatures (Distribution, manifest-v2-1.md, "Signed Manifests"). The
    signatures themselves are not checked.
    """
    if b'"signatures"' not in body:
        return body
    try:
        document, _ = _load(body)
        encoded = (document or {})["signatures"][0]["protected"]
        protected = json.loads(_decode_base64url(encoded))
        length, tail = protected["formatLength"], _decode_base64url(protected["formatTail"])
        if type(length) is not int or not 0 <= length <= len(body):
            return body
        payload = body[:length] + tail
        # Otherwise any manifest could be served with further fields under its own digest.
        return payload if json.loads(payload)["schemaVersion"] == 1 else body
    except (ManifestInvalid, ValueError, TypeError, LookupError, RecursionError):
        return body


@dataclass(frozen=True, slots=True)
class ReferrersPage:
    """One page of a list of referrers."""

    index: bytes
    """An OCI image index."""
    count: int = 0
    """Number of its entries that were pushed here."""
    next_last: str | None = None
    """The next page begins after this digest, or with the first one if it is empty. None: there is
    no next page."""
    digest: Digest | None = None
    """The digest of ``index``. None: it was not computed."""


def referrers_tag(digest: Digest) -> str:
    """Return the tag of the list of referrers (Distribution, "Referrers Tag Schema")."""
    return f"{digest.algorithm[:32]}-{digest.hex[:64]}"


def parse_referrers_tag(name: str) -> str | None:
    """Return the :func:`referrers_tag` of the content to which an image with this tag belongs.

    It is the tag itself, or its beginning: cosign appends ``.sig``, ``.att`` or ``.sbom``, and
    other tools append other words. None: it is a usual tag.
    """
    match = _REFERRERS_TAG.fullmatch(name)
    return match[1] if match is not None else None


def referrers_index(entries: Sequence[Any] = ()) -> bytes:
    """Return an OCI index of referrers. An index without entries means that there are none.

    Args:
        entries: The descriptors, as :func:`parse_referrers` returns them.
    """
    return _dump({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})


def join_referrers(entries: Sequence[bytes]) -> bytes:
    """Return an OCI index of referrers, as :func:`referrers_index`, of entries that are JSON."""
    start, end = referrers_index().rsplit(b"]", 1)
    return b"".join((start, b",".join(entries), b"]", end))


def parse_referrers(body: bytes) -> list[Any]:
    """Return the entries of a referrers index as they are. Raises :class:`ManifestInvalid`."""
    return list(_referrers_document(body)["manifests"])


def add_referrers(body: bytes, further: bytes, *, is_first_page: bool) -> bytes:
    """Return the referrers index ``body`` with the entries of another one, each digest once.

    Args:
        body: The index. All its fields and entries are kept.
        further: The other index.
        is_first_page: False: only what is new in ``further`` is returned.

    Raises:
        ManifestInvalid: One of them is no such index.
    """
    document = _referrers_document(body)
    listed = document["manifests"]
    known = {one.get("digest") for one in listed if isinstance(one, dict)}
    added = [one for one in parse_referrers(further) if one["digest"] not in known]
    if not is_first_page:
        return referrers_index(added)
    return _dump({**document, "manifests": [*listed, *added]}) if added else body


def filter_referrers(body: bytes, artifact_type: str) -> bytes:
    """Return the referrers index ``body`` with the entries of one artifact type only.

    All other fields of the index and of its entries are kept. Raises :class:`ManifestInvalid`.
    """
    document = _referrers_document(body)
    chosen = [
        entry
        for entry in document["manifests"]
        if isinstance(entry, dict) and entry.get("artifactType") == artifact_type
    ]
    return _dump({**document, "manifests": chosen})


# --- parsing ------------------------------------------------------------------------------------


def _dump(document: _Json) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _decode_base64url(text: str) -> bytes:
    """Decode base64url without padding (RFC 7515, section 2). Raises ``ValueError``."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError("not base64url") from error


def _load(body: bytes) -> tuple[_Json | None, bool]:
    """Parse a JSON object as Go's parser does, which most clients use.

    Returns:
        The object, or None if the body is not one; and True if every parser reads the same in it.

    Raises:
        ManifestInvalid: The body is too large, nested too deeply, or has too many objects.
    """
    if len(body) > MANIFEST_LIMIT:
        raise ManifestInvalid(f"a manifest of more than {MANIFEST_LIMIT} bytes")
    if body.count(b"{") + body.count(b"[") > _MAX_NESTED:
        raise ManifestInvalid(f"a manifest with more than {_MAX_NESTED} objects and lists")
    oddities: list[str] = []

    def to_fields(pairs: list[tuple[str, Any]]) -> _Json:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            oddities.append("a key that is there twice")
        return fields

    def to_number(text: str) -> float:
        if not math.isfinite(number := float(text)):
            oddities.append(text)
        return number

    text = body.decode("utf-8", "replace").removeprefix("\ufeff")
    try:
        document = json.loads(
            text,
            object_pairs_hook=to_fields,
            parse_constant=oddities.append,  # NaN and the infinities
            parse_float=to_number,
        )
        has_lone_surrogate = bool(_SURROGATE.search(body)) and not _is_encodable(document)
    except json.JSONDecodeError:
        return None, False
    except RecursionError:
        raise ManifestInvalid("a manifest that is nested too deeply") from None
    except ValueError:  # an integer of more than 4300 digits
        return {}, False
    if not isinstance(document, dict):
        return None, False
    is_utf8 = text.encode("utf-8") == body  # and has no byte order mark
    return document, is_utf8 and not has_lone_surrogate and not oddities


def _is_encodable(document: object) -> bool:
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _declared_type(document: _Json) -> str:
    """Return the ``mediaType`` of a document, or ``application/octet-stream``."""
    declared = document.get("mediaType")
    return manifest_type_of(declared) if isinstance(declared, str) else OCTET_STREAM


def _has_image_fields(document: _Json) -> bool:
    # Go does not tell null from absence.
    return any(document.get(name) is not None for name in _IMAGE_FIELDS)


def _is_consistent(document: _Json, media_type: str) -> bool:
    """Return whether a document can be read as ``media_type``, and as no other type."""
    declared, known = document.get("mediaType"), media_type.lower()
    if declared not in (None, "") and str(declared).lower() != known:
        return False
    is_index, is_image = document.get("manifests") is not None, _has_image_fields(document)
    if is_index and is_image:
        return False
    if known in INDEX_TYPES:
        return not is_image
    return known not in IMAGE_MANIFEST_TYPES or not (is_index or "fsLayers" in document)


def _to_manifest(document: _Json, media_type: str) -> Manifest:
    _refuse_case_variants(document)
    _refuse_case_variants(document.get("subject"))
    if not _is_consistent(document, media_type):
        raise _NotUnderstood
    fields = _PARTS.get(media_type.lower(), _ALL_PARTS)
    document = {name: document[name] for name in fields if name in document}
    config, entries = document.get("config"), _descriptors(document, "manifests")
    # The entries of BuildKit's registry cache are layers, which are requested as blobs.
    is_manifest = [e.media_type.lower() in CHILD_TYPES for e in entries]
    return Manifest(
        media_type=media_type,
        children=tuple(compress(entries, is_manifest)),
        blobs=(() if config is None else (_descriptor(config),))
        + _descriptors(document, "layers")
        + _descriptors(document, "blobs")
        + tuple(compress(entries, map(not_, is_manifest))),
    )


def _refuse_case_variants(fields: object) -> None:
    """Refuse an object with a key that Go reads as another one. Annotations may have any keys."""
    if not isinstance(fields, dict):
        return
    _refuse_case_variants(fields.get("platform"))
    for name in fields:
        if _FIELDS.get(name.casefold(), name) != name:
            raise _NotUnderstood


def _referrers_document(body: bytes) -> _Json:
    document, _ = _load(body)
    entries = (document or {}).get("manifests") or []
    if document is None or "manifests" not in document or not isinstance(entries, list):
        raise ManifestInvalid("a referrers index without manifests")
    return {**document, "manifests": entries}


def _descriptors(document: _Json, field: str) -> tuple[Descriptor, ...]:
    entries = document.get(field)
    if entries is None:  # Go writes an empty list as null
        return ()
    if not isinstance(entries, list):
        raise _NotUnderstood
    return tuple(_descriptor(entry) for entry in entries)


def _descriptor(entry: object) -> Descriptor:
    if not isinstance(entry, dict):
        raise _NotUnderstood
    _refuse_case_variants(entry)
    size, digest, media_type = entry.get("size"), entry.get("digest"), entry.get("mediaType")
    # Not isinstance: in Python, true is an int.
    if type(size) is not int or not 0 <= size <= MAX_DESCRIPTOR_SIZE:
        raise _NotUnderstood
    if not isinstance(digest, str) or not isinstance(media_type, str | None):
        raise _NotUnderstood
    stated = media_type_of(media_type) if media_type else ""
    try:
        return Descriptor(stated, Digest.parse(digest), size, bool(entry.get("urls")))
    except DigestInvalid as error:
        raise _NotUnderstood from error
