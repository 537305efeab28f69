"""The results of the pull service.

Lives here: frozen values for manifests, blobs and tags. Must not know: HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirror.oci.descriptor import Manifest
from mirror.oci.reference import Digest
from mirror.store.reader import Reader


@dataclass(frozen=True, slots=True)
class ManifestResult:
    """A manifest."""

    digest: Digest
    media_type: str
    size: int | None
    """Bytes. None for a ``HEAD`` that was sent on to an upstream whose lengths may be wrong."""
    body: bytes | None
    """None after a ``HEAD`` that was sent on to the upstream."""
    parsed: Manifest | None = None


@dataclass(frozen=True, slots=True)
class BlobResult:
    """A blob. The caller closes the reader."""

    digest: Digest
    size: int | None
    """None while an upstream that does not state the size is still sending."""
    reader: Reader | None
    """None for a ``HEAD``."""


@dataclass(frozen=True, slots=True)
class RepositoriesResult:
    """One page of the repositories that have a manifest on disk, in order."""

    names: tuple[str, ...]
    has_more: bool
    """True if there are repositories after this page."""


@dataclass(frozen=True, slots=True)
class TagsResult:
    """One page of a repository's tags."""

    text: str
    """The tags, see :mod:`mirror.oci.tag_list`."""
    has_more: bool
    """True if there are tags after this page."""
