"""What failover sends and receives: a request to any endpoint, and a response that it accepts.

Lives here: values only. Must not know: which endpoint is next, circuit breakers, credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from mirror.observability.events import Kind
from mirror.oci.errors import MirrorError, UpstreamError
from mirror.oci.reference import Repository
from mirror.upstream.api import ReclaimConnections, keep_connections
from mirror.upstream.retry import is_transient
from mirror.upstream.transport import Destination, Response


@dataclass(frozen=True, slots=True)
class NextPage:
    """A further page of a list."""

    endpoint: str
    """URL of the endpoint that sent the page before. Other endpoints get a request for page one."""
    target: str
    """Target of the ``Link`` header of the page before, in place of ``path`` and ``query``."""


@dataclass(frozen=True, slots=True)
class RegistryRequest:
    """A request to a repository, at any endpoint."""

    method: str
    repository: Repository
    path: str
    """Path below the repository, such as ``tags/list``."""
    kind: Kind
    headers: Mapping[str, str] = field(default_factory=dict)
    endpoint_headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """URL of an endpoint -> further headers, for this endpoint only."""
    query: Mapping[str, str] = field(default_factory=dict)
    page: NextPage | None = None
    is_accepted: Callable[[AcceptedResponse], bool] = lambda response: False
    """Returns True for a usable response whose status is not 200. By default, there is none."""
    ruled_out: Mapping[str, MirrorError] = field(default_factory=dict)
    """URL of an endpoint that does not get the request -> the error that counts as its response."""
    note_failure: Callable[[str, MirrorError], None] = lambda endpoint, error: None
    """Called with the URL of each endpoint that fails, refuses or pauses, and its error."""
    reclaim: ReclaimConnections = keep_connections
    may_retry: Callable[[UpstreamError | None], bool] = is_transient
    """Returns True if another round may begin after one that ended with this failure."""
    may_follow_redirects: bool = True
    is_range: bool = False
    """True for a range of a blob: an endpoint may refuse ranges and yet send whole blobs."""

    def missing_text(self) -> str:
        """Return the text of the error if the upstream does not have what is requested."""
        upstream, path = self.repository.upstream, self.repository.path
        if self.kind is Kind.TAGS:
            return f"{upstream} does not have the repository {path}"
        reference = self.path.rpartition("/")[2]
        return f"{upstream} does not have {path}{'@' if ':' in reference else ':'}{reference}"


@dataclass(frozen=True, slots=True)
class AcceptedResponse(Response):
    """A response with status 200, or one that the request accepts."""

    endpoint: str
    """URL of the endpoint that responded."""
    report_success: Callable[[], None]
    """Reports success to the circuit breaker as soon as the body makes progress.

    If it is not called, success is reported when the body has ended.
    """
    repeat: Repeat
    """Sends the same request to the same endpoint again, over a further connection."""


class Repeat(Protocol):
    """Sends a request again, once, with other headers. Any status is accepted.

    The outcome is not reported to the circuit breaker, and a 429 starts no pause: no client waits
    for such a request alone, so its failure must not stop other requests.
    """

    def __call__(
        self, headers: Mapping[str, str], destination: Destination | None
    ) -> AbstractAsyncContextManager[AcceptedResponse]:
        """Send it to ``destination``, that of an earlier response. None: to the endpoint."""
