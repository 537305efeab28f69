"""Values and callbacks that the modules of this package pass to each other.

Lives here: the requests of clients, and their sources. Must not know: HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from mirror.observability.events import Kind, RequestRecord
from mirror.oci.errors import Denied, MirrorError, NotFound, Unauthorized
from mirror.oci.headers import Span
from mirror.oci.reference import Digest, Repository, Tag
from mirror.store.records import AccessRecord
from mirror.upstream.api import ContentStream, Registry

REFUSALS: Final = (NotFound, Denied, Unauthorized)
"""Definite refusals (404, 403, 401): the upstream works, and this repository does not give us the
content."""

SpanSelector: TypeAlias = Callable[[int], Sequence[Span]]
"""Returns the spans that a client wants of content of this size, in order. They have an end that
the client has stated. Empty: it wants the whole content, or all from some byte on."""

ProofKey: TypeAlias = tuple[Repository, Kind]
"""(repository, kind): the access that a source proves by sending the content. The kind matters: a
registry checks the references of a pushed manifest, not of a blob that looks like a manifest."""


@dataclass(frozen=True, slots=True)
class ContentRequest:
    """A client's request for content by digest, through one repository."""

    repository: Repository
    digest: Digest
    kind: Kind
    """Manifest or blob. A digest can be known in a repository as either, or as both."""
    pull: RequestRecord
    """Record of the client's request. Its outcome and its stages are written there."""
    accept: tuple[str, ...] = ()
    """Media types of the client's ``Accept`` header, for a manifest."""
    select_spans: SpanSelector | None = None
    """None: the client wants the whole content, or all from some byte on."""

    @property
    def proof_key(self) -> ProofKey:
        """The access that a response with the content proves."""
        return self.repository, self.kind

    def first_byte(self, size: int | None) -> int:
        """Return the offset of the first wanted byte of content of this size. None: not known."""
        if self.select_spans is None or size is None:
            return 0
        return next((span.start for span in self.select_spans(size)), 0)


@dataclass(frozen=True, slots=True)
class TagRequest:
    """A client's request for a manifest by tag."""

    repository: Repository
    tag: Tag
    pull: RequestRecord
    """Record of the client's request. Its outcome and its stages are written there."""
    accept: tuple[str, ...]
    """Media types of the client's ``Accept`` header."""
    is_head: bool = False
    """True if the client wants no body."""
    is_refresh: bool = False
    """True to ask the upstream also if the cached tag is fresh, and to serve nothing stale."""


@dataclass(frozen=True, slots=True)
class ContentSource:
    """One upstream repository that may have the content of a request."""

    registry: Registry
    request: ContentRequest
    access_record: AccessRecord | None = None
    """Earlier knowledge of the content there."""
    avoid: Collection[str] = ()
    """Endpoints that sent wrong bytes for this content before. They are tried last."""
    is_suspect: bool = False
    """True if this source's upstream has sent wrong bytes for this content before."""


class AccessCallbacks(Protocol):
    """Callbacks for access decisions: the upstream has the content in a repository, or refused."""

    def on_granted(self, source: ContentSource, stream: ContentStream) -> None:
        """Handle the first response of a source with the content. Must not delay the first byte."""

    async def on_refused(self, source: ContentSource, error: MirrorError) -> None:
        """Handle the 404, 403 or 401 of a source."""
