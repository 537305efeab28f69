"""The results of the pull service.

Lives here: frozen values for manifests, blobs and tags, and how long one may be used again. Must
not know: HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self, TypeAlias

from mirror.oci.descriptor import Manifest
from mirror.oci.reference import Digest
from mirror.store.reader import Reader

MEMORY_TTL_S: Final = 1.0
"""Seconds for which one worker process may serve from memory what another one has changed."""
IsFresh: TypeAlias = Callable[[], bool]
"""Returns whether the same request would have the same result now: whether the result is still
fresh (RFC 9111, section 4.2). Asks neither the upstream nor the disk."""


def fresh_for(seconds: float) -> IsFresh:
    """Make a function that returns True for ``seconds`` from now on, and False after that."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until


def is_never_fresh() -> bool:
    """Return False: the service has to be asked again."""
    return False


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
    is_fresh: IsFresh = field(default=is_never_fresh, compare=False)

    @classmethod
    def of_body(cls, digest: Digest, body: bytes, parsed: Manifest) -> Self:
        """Return the result of a whole manifest.

        Args:
            digest: The digest of ``body``.
            body: All bytes.
            parsed: The manifest of these bytes.
        """
        return cls(digest, parsed.media_type, size=len(body), body=body, parsed=parsed)


@dataclass(frozen=True, slots=True)
class BlobResult:
    """A blob. The caller closes its reader, if it has one."""

    digest: Digest
    size: int | None
    """None while an upstream that does not state the size is still sending."""
    content: Reader | bytes | None
    """None for a ``HEAD`` of a blob that is not in memory."""
    is_fresh: IsFresh = field(default=is_never_fresh, compare=False)


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
