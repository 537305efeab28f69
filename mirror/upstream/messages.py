"""What failover sends and receives: a request to any endpoint, and a response that it accepts.

Lives here: values only. Must not know: which endpoint is next, circuit breakers, credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mirror.observability.events import Kind
from mirror.oci.errors import UpstreamError
from mirror.oci.reference import Repository
from mirror.upstream.retry import is_transient
from mirror.upstream.transport import Response


@dataclass(frozen=True, slots=True)
class NextPage:
    """A further page of a list."""

    endpoint: str
    """URL of the endpoint that sent the page before. The others get a request for the first one."""
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
    """Returns True for a status other than 200 that is no error. By default no status is one."""
    may_retry: Callable[[UpstreamError | None], bool] = is_transient
    """Returns True if another round may begin after one that ended with this failure."""
    follow_redirects: bool = True


@dataclass(frozen=True, slots=True)
class AcceptedResponse(Response):
    """A response with status 200, or one that the request accepts."""

    endpoint: str
    """URL of the endpoint that responded."""
    report_success: Callable[[], None]
    """Reports success to the circuit breaker as soon as the body makes progress.

    If it is not called, success is reported when the body has ended.
    """
