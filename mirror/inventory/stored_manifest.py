"""What a manifest on disk says: its type, its platform, its parts.

Lives here: frozen values. Must not know: files, databases, images.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import repeat
from typing import Final, NamedTuple, TypeAlias

from mirror.oci.reference import Digest

DigestText: TypeAlias = str
"""``algorithm:hex``."""


class ContentType(StrEnum):
    """The role of a content, by the manifests that refer to it."""

    INDEX = "index"
    MANIFEST = "manifest"
    CONFIG = "config"
    LAYER = "layer"
    REFERRER = "referrer"
    """A signature, an SBOM, an attestation: its manifest, and the content of that manifest."""
    OTHER = "other"
    """Unknown: no manifest on disk refers to it."""


MANIFEST_PART_TYPES: Final = frozenset(
    {ContentType.INDEX, ContentType.MANIFEST, ContentType.REFERRER}
)
"""Types of the parts that are manifests."""


CONTENT_TYPES: Final = {content_type.value: content_type for content_type in ContentType}
"""Value -> type. To look it up is ten times as fast as to call the type."""


class ManifestPart(NamedTuple):
    """One descriptor of a manifest. A tuple: an inventory has 100,000 of them."""

    text: DigestText
    media_type: str
    """Empty: the descriptor states none."""
    size: int
    """Bytes, as the manifest states."""
    type: ContentType
    platform: str | None = None
    """``os/architecture`` or ``os/architecture/variant`` of an index's entry. None: not stated."""
    is_elsewhere: bool = False
    """Whether registries need not have it (see :class:`mirror.oci.descriptor.Descriptor`)."""

    @property
    def digest(self) -> Digest:
        """The digest of the part."""
        return Digest.parse(self.text)


class PartColumns(NamedTuple):
    """The parts of a manifest, one sequence for each field of :class:`ManifestPart`.

    Most listings need two of the fields, and to make 100,000 parts takes 0.1 s.
    """

    digests: Sequence[DigestText] = ()
    media_types: Sequence[str] = ()
    sizes: Sequence[int] = ()
    types: Sequence[str] = ()
    platforms: Sequence[str | None] = ()
    """Empty: no part states one."""
    elsewhere: Sequence[bool] = ()
    """Empty: a registry needs to have all parts."""

    @classmethod
    def of(cls, parts: Sequence[ManifestPart]) -> PartColumns:
        """Return the columns of parts."""
        return cls(
            [part.text for part in parts],
            [part.media_type for part in parts],
            [part.size for part in parts],
            [part.type for part in parts],
            [part.platform for part in parts if any(one.platform for one in parts)],
            [part.is_elsewhere for part in parts if any(one.is_elsewhere for one in parts)],
        )


class StoredManifest(NamedTuple):
    """A manifest on disk, parsed. A tuple: an inventory has 20,000 of them."""

    text: DigestText
    media_type: str
    type: ContentType
    """``INDEX``, ``MANIFEST`` or ``REFERRER``."""
    columns: PartColumns
    """The fields of its parts."""
    artifact_type: str | None = None
    subject: DigestText | None = None
    """The content that it belongs to, of a signature or an SBOM."""
    platform: str | None = None
    """Of a single image, from its config. None: not known yet. Empty: the config states none."""
    is_opaque: bool = False
    """Whether its parts are not known."""

    @property
    def parts(self) -> tuple[ManifestPart, ...]:
        """Its parts, made at each call.

        They are in the order of the document: the manifests of an index; or the config, then the
        layers.
        """
        columns = self.columns
        return tuple(
            map(
                ManifestPart,
                columns.digests,
                columns.media_types,
                columns.sizes,
                map(CONTENT_TYPES.__getitem__, columns.types),
                columns.platforms or repeat(None),
                columns.elsewhere or repeat(False),
            )
        )

    @property
    def digest(self) -> Digest:
        """The digest of the manifest."""
        return Digest.parse(self.text)
