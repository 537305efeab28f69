"""``HEAD`` requests of one upstream: when one is believed, and when a ``GET`` decides.

Lives here: what the ``HEAD`` of each endpoint says about a ``GET``. Must not know: what is
requested, how a response is read, tokens, circuit breakers.

Theory of operation. Registries refuse ``HEAD`` where they would answer a ``GET``: with 405 or 501,
with 400, 401 or 403 (public ECR), with a 404, with a 5xx, or not at all. Signed URLs refuse it too
(GHCR, GitLab), each in its own way. So each endpoint gets a ``HEAD`` once. If none answers it with
200, a ``GET`` decides. The ``GET`` is not sent to the endpoints whose ``HEAD`` has ruled it out
(:meth:`Heads._is_get_ruled_out`). If that is every endpoint, the error of the ``HEAD`` is final.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final, TypeVar

from cachetools import LRUCache

from mirror.observability.events import Kind
from mirror.oci.errors import (
    Draining,
    MirrorError,
    NotFound,
    OutboundRefused,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.upstream.failover import FailoverClient
from mirror.upstream.messages import AcceptedResponse, RegistryRequest
from mirror.upstream.retry import is_transient

T = TypeVar("T")

FIRST_REST_S: Final = 5.0
"""Seconds for which no ``HEAD`` is sent to a repository where one got no response in time, so that
only the first client waits for it. Few, since a single late response is no habit."""
_MAX_REST_S: Final = 60.0
"""Seconds at most: the time doubles while each ``HEAD`` after it gets no response either."""
_MAX_RESTS: Final = 1024
"""Repositories that are remembered at most: far more than are pulled in that time."""


class Heads:
    """Sends the ``HEAD`` requests of one upstream, and remembers which endpoints answer them."""

    def __init__(self, client: FailoverClient, clock: Callable[[], float] = time.monotonic) -> None:
        """Create it. ``client`` sends the requests, ``clock`` returns seconds."""
        self._client = client
        self._clock = clock
        self._answered: set[tuple[str, Kind]] = set()
        """(URL of an endpoint, kind of content) for which a ``HEAD`` got a 200."""
        self._rests: LRUCache[tuple[Repository, Kind], tuple[float, float]] = LRUCache(_MAX_RESTS)
        """Repository and kind of content whose last ``HEAD`` got no response in time -> (time until
        which none is sent, seconds of the next such time)."""

    async def ask(
        self, request: RegistryRequest, read: Callable[[AcceptedResponse], Awaitable[T]]
    ) -> tuple[T | None, Mapping[str, MirrorError]]:
        """Send a ``HEAD``.

        Args:
            request: The request.
            read: Called with a response of status 200. See :meth:`FailoverClient.send`.

        Returns:
            (What ``read`` returned, nothing). Or (None, ``ruled_out`` of the ``GET`` that has to
            decide).

        Raises:
            MirrorError: see :meth:`FailoverClient.send`. A ``GET`` would fail, too.
        """
        key = request.repository, request.kind
        rests_until, rest_s = self._rests.get(key, (0.0, FIRST_REST_S))
        if self._clock() < rests_until:
            return None, {}
        failures: dict[str, MirrorError] = {}

        def ruled_out() -> dict[str, MirrorError]:
            return {
                endpoint: error
                for endpoint, error in failures.items()
                if self._is_get_ruled_out(endpoint, request.kind, error)
            }

        def is_final() -> bool:
            return len(ruled_out()) == len(self._client.endpoint_urls)

        def may_retry(error: UpstreamError | None) -> bool:
            return is_transient(error) and is_final()  # Otherwise the GET is the retry.

        async def read_and_learn(response: AcceptedResponse) -> T:
            result = await read(response)
            self._answered.add((response.endpoint, request.kind))
            return result

        head = replace(request, note_failure=failures.__setitem__, may_retry=may_retry)
        try:
            result = await self._client.fetch(head, read_and_learn)
        except Draining:
            raise
        except MirrorError:
            if is_final():
                raise
        else:
            self._rests.pop(key, None)
            return result, {}
        without_get = ruled_out()
        doubts = (error for endpoint, error in failures.items() if endpoint not in without_get)
        if any(isinstance(error, UpstreamTimeout) for error in doubts):
            self._rests[key] = self._clock() + rest_s, min(2 * rest_s, _MAX_REST_S)
        return None, without_get

    def _is_get_ruled_out(self, endpoint: str, kind: Kind, error: MirrorError) -> bool:
        """Return whether no ``GET`` is sent to an endpoint whose ``HEAD`` failed with ``error``.

        True if it certainly does not have the content, if no kind of request would get through, or
        if it has asked us to wait: a ``GET`` in that time would be one request too many.
        """
        match error:
            case MirrorError(is_without_token=True) | OutboundRefused():
                return True
            case NotFound():
                return (endpoint, kind) in self._answered
            case UpstreamRateLimited():
                return bool(error.retry_after)
            case UpstreamUnavailable():
                return not error.may_depend_on_request
            case _:
                return False
