"""What the pull room answers, as frozen values. Must not know: HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from mirror.oci.descriptor import Manifest
from mirror.oci.reference import Digest
from mirror.store.reader import Extent, FileExtent, MemoryExtent, Reader

__all__ = [
    "BlobResult",
    "Extent",
    "FileExtent",
    "ManifestResult",
    "MemoryExtent",
    "Reader",
    "TagsResult",
]


@dataclass(frozen=True, slots=True)
class ManifestResult:
    """A manifest. ``body`` is None where only a ``HEAD`` was asked of the upstream."""

    digest: Digest
    media_type: str
    size: int
    body: bytes | None
    parsed: Manifest | None = None


@dataclass(frozen=True, slots=True)
class BlobResult:
    """A blob; ``reader`` is None for a ``HEAD``. The caller closes the reader."""

    digest: Digest
    size: int | None
    reader: Reader | None


@dataclass(frozen=True, slots=True)
class TagsResult:
    """One page of a repository's tags, in order."""

    tags: tuple[str, ...]
    more: bool
