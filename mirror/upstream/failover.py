"""Failover: send one request to the endpoints of an upstream until one sends an accepted response.

Lives here: the order of the attempts, retries within their limits, credentials where an endpoint
requires them, and reports to the circuit breakers. Must not know: what is requested, how a response
is read.

Theory of operation. A round tries each endpoint that its circuit breaker permits, once. A failure
leads to the next endpoint. So does a refusal (401, 403, 404), since the next endpoint may have the
content, and so does a response that its reader cannot use, such as a log-in page. A refusal is
final when all endpoints have refused. If one could not be asked, the result is its failure. If the
last failure of a round is transient, another round begins after a delay, without the endpoints that
have refused or sent a useless response. All rounds together have ``MAX_ATTEMPTS_PER_REQUEST``
failures and ``RETRY_BUDGET_S`` seconds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar
from urllib.parse import quote

from aiohttp import hdrs
from yarl import URL

from mirror.config.settings import Upstream
from mirror.observability.events import CircuitChanged, ExchangeEnded, Kind, Observer, RateLimitSeen
from mirror.oci.errors import (
    Draining,
    FailureScope,
    MirrorError,
    OutboundRefused,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.links import page_target
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.auth import Authenticator, Negotiation
from mirror.upstream.endpoints import Endpoints, RequestScope, SendState, rate_limited
from mirror.upstream.failures import ResponseLimit
from mirror.upstream.messages import AcceptedResponse, NextPage, RegistryRequest
from mirror.upstream.outbound import (
    TOKEN_HOSTS,
    Allowed,
    Policy,
    UrlSource,
    as_url,
    check_url,
)
from mirror.upstream.retry import RETRY_BUDGET_S, backoff_delay
from mirror.upstream.statuses import error_of
from mirror.upstream.token_requests import TokenTransport
from mirror.upstream.transport import (
    Destination,
    Response,
    Transport,
    parse_rate_limit,
    token_deadline,
)

T = TypeVar("T")

_TOO_MANY_CONNECTIONS: Final = (0, 429, 503)
"""Statuses of an endpoint, or of a firewall before it, that limits the connections of one address.
0: no response."""
_ACCESS_REFUSED: Final = (401, 403)
"""Statuses after which another authorization may be accepted (RFC 9110, section 11.6.1)."""


@dataclass(slots=True)
class _Attempt:
    """One request to one endpoint."""

    policy: Policy
    request: RegistryRequest
    is_probe: bool
    """Whether it is the probe of a half-open circuit."""
    is_repeat: bool
    """Whether the same request was sent to this endpoint before."""
    limit: ResponseLimit
    status: int = 0
    """Status of its response. 0: it had none."""
    is_recorded: bool = False
    """Whether the circuit breaker knows the outcome."""
    is_accepted: bool = False
    """Whether the endpoint sent a response that the request accepts. Its reader may still fail."""
    refusal: MirrorError | None = None
    """Reason of a 401: which credentials are missing, or were refused. None: no 401."""
    destination: Destination | None = None
    """Where the request is sent. None: to the endpoint."""

    @property
    def scope(self) -> RequestScope:
        """The requests that a failure of this one counts for."""
        return _scope_of(self.request)

    def url(self) -> URL:
        """Return the URL of the request. Raises ``OutboundRefused`` if the guard refuses it."""
        path = f"{quote(self.request.repository.path)}/{quote(self.request.path, safe=':/')}"
        query = dict(self.request.query)
        url = URL(f"{self.policy.repositories_url}{path}", encoded=True).with_query(query)
        target, source, name = str(url), UrlSource.ENDPOINT, "endpoint"
        page = self.request.page
        if page is not None and page.endpoint == str(self.policy.endpoint):
            target = page_target(target, self.request.path, page.target)
            source, name = UrlSource.NEXT_PAGE, "next page"
        verdict = check_url(target, source, url, self.policy)
        if not isinstance(verdict, Allowed):
            raise OutboundRefused(f"{name} refused: {verdict.why}")
        return verdict.url


class FailoverClient:
    """Sends requests to one upstream."""

    def __init__(
        self,
        name: str,
        settings: Upstream,
        transport: Transport,
        emit: Observer,
        single_flight: SingleFlight,
        own_addresses: Collection[tuple[str, int]] = (),
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Create a client.

        Args:
            name: Name of the upstream, for events.
            settings: The upstream.
            transport: Sends single requests.
            emit: Receives events.
            single_flight: Runs requests for tokens and look-ups of logins.
            own_addresses: (host, port) pairs at which this mirror listens.
            clock: Returns seconds for circuit breakers, tokens and logins.
            jitter: Returns a random number in [0, 1).
        """
        self._name = name
        self._transport = transport
        self._emit = emit
        self._clock = clock
        self._jitter = jitter
        self._endpoints = Endpoints(tuple(as_url(url) for url in settings.endpoints))
        token_hosts = (*settings.token_hosts, *TOKEN_HOSTS.get(name, ()))
        self._policies = {
            url: Policy(
                url,
                token_hosts=token_hosts + TOKEN_HOSTS.get(url.host or "", ()),
                own_addresses=own_addresses,
                redirect_hosts=settings.redirect_hosts,
                upstream=name,
            )
            for url in self._endpoints.urls
        }
        tokens = TokenTransport(name, transport, self._endpoints.urls)
        self._auth = Authenticator(name, settings, tokens.send, emit, single_flight, clock)

    @property
    def endpoint_urls(self) -> list[str]:
        """The URLs of the endpoints, in the order of the configuration."""
        return [str(url) for url in self._endpoints.urls]

    async def fetch(
        self,
        request: RegistryRequest,
        read: Callable[[AcceptedResponse], Awaitable[T]],
        avoid: Collection[str] = (),
    ) -> T:
        """Send a request, and return what ``read`` returns. See :meth:`send`."""
        async with self.send(request, read, avoid) as result:
            return result

    @asynccontextmanager
    async def send(
        self,
        request: RegistryRequest,
        read: Callable[[AcceptedResponse], Awaitable[T]],
        avoid: Collection[str] = (),
    ) -> AsyncIterator[T]:
        """Send a request, and yield what ``read`` returns for the first response that is usable.

        Args:
            request: The request.
            read: Called with an accepted response. If it raises an ``UpstreamError``, the response
                cannot be used. If it raises another ``MirrorError``, that is a refusal. The next
                endpoint is asked in both cases, and this one is not asked again.
            avoid: URLs of endpoints to try last, in this order.

        Raises:
            NotFound, Unauthorized, Denied: all endpoints refused. Unauthorized and Denied take
                precedence, because an endpoint that denies access may have the content.
            UpstreamError: no endpoint sent a usable response, and at least one could not be
                asked. It is the failure of the last attempt, or ``UpstreamRateLimited`` if any
                endpoint pauses after a 429.
            Draining: the process shuts down.
        """
        async with AsyncExitStack() as stack:
            yield await self._run_rounds(stack, request, read, avoid)

    async def _run_rounds(
        self,
        stack: AsyncExitStack,
        request: RegistryRequest,
        read: Callable[[AcceptedResponse], Awaitable[T]],
        avoid: Collection[str],
    ) -> T:
        """Run attempts until one succeeds, which stays open on ``stack``. See :meth:`send`."""
        now, urls, scope = self._clock(), self._endpoints.urls, _scope_of(request)
        ruled_out = {url: request.ruled_out.get(str(url)) for url in urls}
        finished = {url: error for url, error in ruled_out.items() if error is not None}
        state = SendState(now + RETRY_BUDGET_S, finished=finished)
        for url, seconds in self._endpoints.remaining_pauses(now, scope).items():
            request.note_failure(str(url), rate_limited(seconds))
        while True:
            attempts_before = state.attempts
            for attempt in self._attempts_of_round(state, request, avoid):
                try:
                    return await stack.enter_async_context(self._run_attempt(attempt, read))
                except Draining:
                    raise
                except MirrorError as error:
                    state.add(attempt.policy.endpoint, error, is_final=attempt.is_accepted)
                    request.note_failure(str(attempt.policy.endpoint), error)
            if len(state.refusals()) == len(urls):
                raise state.final_refusal()
            is_last_round = (
                state.attempts == attempts_before
                or len(state.finished) == len(urls)
                or not state.may_begin_round(self._clock())
            )
            latest = state.failures[-1] if state.failures else None
            if is_last_round or not request.may_retry(latest):
                raise self._endpoints.final_error(state, self._clock(), scope)
            await asyncio.sleep(backoff_delay(state.attempts, self._jitter()))

    def _attempts_of_round(
        self, state: SendState, request: RegistryRequest, avoid: Collection[str]
    ) -> Iterator[_Attempt]:
        """Begin an attempt at each endpoint that may be asked, the best one first."""
        scope = _scope_of(request)
        permitted = self._endpoints.candidates(self._clock(), scope, avoid)
        candidates = [endpoint for endpoint in permitted if endpoint not in state.finished]
        for position, endpoint in enumerate(candidates, 1):
            now = self._clock()
            if not self._endpoints.may_request(endpoint, now, scope):
                continue  # Another request may have become the probe since.
            if not state.may_attempt(now):
                return
            state.attempts += 1
            is_probe = self._endpoints.circuits[endpoint].begin_request(scope)
            # A blob gets a shorter time limit (`limits.headers`) if other requests wait for this
            # probe, or if another endpoint may respond at once.
            is_urgent = is_probe or not all(
                self._endpoints.has_failed(other, now, scope) for other in candidates[position:]
            )
            is_repeat = endpoint in state.tried
            state.tried.add(endpoint)
            yield _Attempt(
                self._policies[endpoint],
                request,
                is_probe=is_probe,
                is_repeat=is_repeat,
                limit=self._transport.response_limit(request.kind, is_urgent=is_urgent),
            )

    async def ping(self, endpoint: URL, repository: Repository) -> tuple[int, str | None]:
        """Ask one endpoint, once, for the version of its API.

        See Distribution, "Determining Support".

        Args:
            endpoint: One of the endpoints of the upstream.
            repository: The repository for which a token is requested, if one is needed.

        Returns:
            The status and the ``Content-Type`` of the response.

        Raises:
            Unauthorized, Denied: the endpoint, or its token service, refused.
            UpstreamError: the endpoint, or its token service, sent no usable response.
        """
        policy = self._policies[endpoint]
        request = RegistryRequest(
            "GET",
            repository,
            path="",
            kind=Kind.TAGS,
            page=NextPage(str(endpoint), policy.api_url),
            is_accepted=lambda response: response.http.status not in _ACCESS_REFUSED,
        )
        limit = self._transport.response_limit()
        attempt = _Attempt(policy, request, is_probe=False, is_repeat=False, limit=limit)

        async def read(response: AcceptedResponse) -> tuple[int, str | None]:
            return response.http.status, response.http.headers.get(hdrs.CONTENT_TYPE)

        async with self._run_attempt(attempt, read) as result:
            return result

    @asynccontextmanager
    async def _run_attempt(
        self, attempt: _Attempt, read: Callable[[AcceptedResponse], Awaitable[T]]
    ) -> AsyncIterator[T]:
        """Send the request to one endpoint, and report the outcome to its circuit breaker."""
        async with AsyncExitStack() as stack:
            try:
                response = await self._send_authorized(stack, attempt)
                attempt.status = response.http.status
                accepted = AcceptedResponse(
                    response.http,
                    response.destination,
                    response.limits,
                    str(attempt.policy.endpoint),
                    report_success=partial(self._record_outcome, attempt, None),
                    repeat=partial(self._repeat, attempt),
                )
                if response.http.status != 200 and not attempt.request.is_accepted(accepted):
                    raise attempt.refusal or await error_of(
                        response, attempt.request.kind, attempt.request.missing_text()
                    )
                if response.is_cross_origin:
                    # The body comes from a storage behind the endpoint, which has done its part.
                    accepted.report_success()
                attempt.is_accepted = True
                yield await read(accepted)
            except BaseException as error:
                if isinstance(error, MirrorError):
                    error.endpoint = str(attempt.policy.endpoint)
                self._record_outcome(attempt, error)
                raise
            self._record_outcome(attempt, None)

    def _repeat(
        self, attempt: _Attempt, headers: Mapping[str, str], destination: Destination | None
    ) -> AbstractAsyncContextManager[AcceptedResponse]:
        """Send the request of ``attempt`` again. See :class:`Repeat`."""
        request = replace(
            attempt.request, headers=headers, endpoint_headers={}, is_accepted=lambda response: True
        )
        again = _Attempt(
            attempt.policy,
            request,
            is_probe=False,
            is_repeat=True,
            limit=self._transport.response_limit(request.kind, is_urgent=True),
            is_recorded=True,
            destination=destination,
        )
        return self._run_attempt(again, _whole_response)

    async def _send_authorized(self, stack: AsyncExitStack, attempt: _Attempt) -> Response:
        """Send the request with credentials, as far as the endpoint requires them.

        A refused authorization leads to a request without one. Each further 401 leads to a request
        with the next authorization, as long as there is one.
        """
        url = attempt.url()
        negotiation = Negotiation(self._auth, attempt.policy, attempt.request.repository)
        async with token_deadline(attempt.limit):
            header: str | None = await negotiation.first()
        while True:
            response = await self._exchange(stack, attempt, url, header or "")
            if response.is_cross_origin or response.http.status not in _ACCESS_REFUSED:
                negotiation.accept()
                return response
            challenges = response.http.headers.getall(hdrs.WWW_AUTHENTICATE, ())
            async with token_deadline(attempt.limit):
                header = await negotiation.next(response.http.status, challenges)
            if header is None:
                if response.http.status == 401:
                    attempt.refusal = negotiation.refusal()
                return response

    async def _exchange(
        self,
        stack: AsyncExitStack,
        attempt: _Attempt,
        url: URL,
        authorization: str,
    ) -> Response:
        """Run one exchange on ``stack``, in place of the one before it, and emit its event.

        ``authorization``: the value of the header. Empty: it is not sent.
        """
        await stack.aclose()
        request, endpoint = attempt.request, str(attempt.policy.endpoint)
        headers = {**request.headers, **request.endpoint_headers.get(endpoint, {})}
        if authorization:
            headers["Authorization"] = authorization
        exchange = self._transport.exchange(
            request.method,
            url,
            headers,
            attempt.policy,
            may_follow_redirects=request.may_follow_redirects,
            limit=attempt.limit,
            destination=attempt.destination,
        )
        started_at, status, message = self._clock(), 0, ""
        try:
            response = await stack.enter_async_context(exchange)
            status = response.http.status
            rate_limit = parse_rate_limit(response.http.headers)
            if rate_limit is not None:
                self._emit(RateLimitSeen(self._name, *rate_limit))
            return response
        except MirrorError as error:
            message = error.message
            raise
        finally:
            # Docker Hub counts each GET of a manifest as a pull.
            method, kind, seconds = request.method, request.kind, self._clock() - started_at
            billed = method == "GET" and kind is Kind.MANIFEST and status in (200, 206)
            self._emit(
                ExchangeEnded(self._name, endpoint, method, kind, status, seconds, billed, message)
            )

    def _record_outcome(self, attempt: _Attempt, error: BaseException | None) -> None:
        """Report the outcome of an attempt to the circuit breaker, once.

        A failure counts once per request at each endpoint, however often the request is retried.
        """
        if attempt.is_recorded:
            return
        attempt.is_recorded = True
        endpoint, scope = attempt.policy.endpoint, attempt.scope
        circuit, is_probe = self._endpoints.circuits[endpoint], attempt.is_probe
        was_open = circuit.is_open
        if _may_depend_on_connections(attempt, error) and attempt.request.reclaim(str(endpoint)):
            circuit.record_cancellation(is_probe=is_probe)
            return
        match error:
            case UpstreamRateLimited():
                circuit.record_success()
                self._endpoints.pauses[endpoint].add(self._clock(), scope, error.retry_after)
            case OutboundRefused() | UpstreamUnavailable(scope=FailureScope.NONE) | Draining():
                circuit.record_cancellation(is_probe=is_probe)
            case UpstreamUnavailable(scope=FailureScope.SAME_KIND | FailureScope.ENDPOINT):
                self._endpoints.last_failure = error.message
                if is_probe or not attempt.is_repeat:
                    circuit.record_failure(
                        self._clock(),
                        scope,
                        is_probe=is_probe,
                        is_unreachable=error.scope is FailureScope.ENDPOINT,
                    )
            case None | MirrorError():
                circuit.record_success()
            case _:  # The task was cancelled, or the reader of the body failed.
                circuit.record_cancellation(is_probe=is_probe)
        if circuit.is_open != was_open:
            self._emit(CircuitChanged(self._name, str(endpoint), circuit.is_open))


def _may_depend_on_connections(attempt: _Attempt, error: BaseException | None) -> bool:
    """Return whether other connections of ours may have made a request to an endpoint fail."""
    is_failure = isinstance(error, UpstreamUnavailable) and not error.is_without_token
    return is_failure and attempt.status in _TOO_MANY_CONNECTIONS


def _scope_of(request: RegistryRequest) -> RequestScope:
    """Return the requests that a failure of this one counts for."""
    kind = f"{request.kind.value} range" if request.is_range else request.kind.value
    return RequestScope(f"{request.method} {kind}", request.repository.path)


async def _whole_response(response: AcceptedResponse) -> AcceptedResponse:
    return response
