"""What all rows of content of hosted repositories have.

Lives here: their types. Must not know: queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirror.oci.reference import Digest


@dataclass(frozen=True, slots=True)
class ContentRow:
    """A blob or a manifest of a repository."""

    repository: str
    digest: Digest
    media_type: str
    """Of a manifest. ``application/octet-stream`` for a blob."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class PushedRow(ContentRow):
    """A manifest that a client has just pushed."""

    image_size: int | None
    """See :attr:`mirror.hosted.pushed_manifest.PushedManifest.image_size`."""
