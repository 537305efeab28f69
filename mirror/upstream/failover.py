"""Failover: send one request to the endpoints of an upstream until one sends an accepted response.

Lives here: the order of the attempts, retries within their limits, credentials where an endpoint
requires them, and reports to the circuit breakers. Must not know: what is requested, how a response
is read.

Theory of operation. A round tries each endpoint that its circuit breaker permits, once. A failure
leads to the next endpoint, and so does a refusal (401, 403, 404): the next endpoint may have the
content. A refusal is final when all endpoints have refused. If one could not be asked, the result
is its failure. If the last failure of a round is transient, another round begins after a delay,
without the endpoints that have refused. All rounds together have ``MAX_ATTEMPTS_PER_REQUEST``
failures and ``RETRY_BUDGET_S`` seconds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol
from urllib.parse import quote

from aiohttp import hdrs
from yarl import URL

from mirror.config.settings import Upstream
from mirror.observability.events import CircuitChanged, ExchangeEnded, Kind, Observer, RateLimitSeen
from mirror.oci.errors import (
    AllCircuitsOpen,
    Draining,
    FailureScope,
    MirrorError,
    NotFound,
    OutboundRefused,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.links import page_target
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.auth import (
    MAX_TOKEN_RESPONSE_BYTES,
    Authenticator,
    Negotiation,
    TokenResponse,
)
from mirror.upstream.endpoints import Endpoints, Subject
from mirror.upstream.failures import ResponseLimit
from mirror.upstream.outbound import (
    TOKEN_HOSTS,
    Allowed,
    Policy,
    UrlSource,
    as_url,
    check_url,
    realm_rule,
)
from mirror.upstream.retry import (
    MAX_ATTEMPTS_PER_REQUEST,
    RETRY_BUDGET_S,
    backoff_delay,
    is_transient,
)
from mirror.upstream.statuses import error_of
from mirror.upstream.transport import (
    Destination,
    Response,
    Transport,
    parse_rate_limit,
    read_body,
    retry_after_of,
)

_ACCESS_REFUSED: Final = (401, 403)
"""Statuses after which another authorization may be accepted (RFC 9110, section 11.6.1)."""


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
    page: str | None = None
    """Target of the ``Link`` header of the page before, in place of ``path`` and ``query``."""
    is_accepted: Callable[[AcceptedResponse], bool] = lambda response: False
    """Returns True for a status other than 200 that is no error. By default no status is one."""
    follow_redirects: bool = True
    is_part: bool = False
    """True for a part of a blob: an endpoint may refuse parts and yet send whole blobs."""

    @property
    def subject(self) -> Subject:
        """The requests that a failure of this one counts for."""
        kind = f"{self.kind.value} part" if self.is_part else self.kind.value
        return Subject(f"{self.method} {kind}", self.repository.path)


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

    The outcome is not reported to the circuit breaker, and a 429 begins no pause: further
    connections are our own wish, and say nothing about requests that clients wait for.
    """

    def __call__(
        self, headers: Mapping[str, str], destination: Destination | None
    ) -> AbstractAsyncContextManager[AcceptedResponse]:
        """Send it to ``destination``, that of an earlier response. None: to the endpoint."""


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
    is_recorded: bool = False
    """Whether the circuit breaker knows the outcome."""
    refusal: MirrorError | None = None
    """Reason of a 401: which credentials are missing, or were refused. None: no 401."""
    destination: Destination | None = None
    """Where the request is sent. None: to the endpoint."""

    def url(self) -> URL:
        """Return the URL of the request. Raises ``OutboundRefused`` if the guard refuses it."""
        path = f"{quote(self.request.repository.path)}/{quote(self.request.path, safe=':/')}"
        query = dict(self.request.query)
        url = URL(f"{self.policy.repositories_url}{path}", encoded=True).with_query(query)
        target, source, name = str(url), UrlSource.ENDPOINT, "endpoint"
        if self.request.page is not None:
            target = page_target(target, self.request.path, self.request.page)
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
        self._last_failure = ""
        self._endpoints = Endpoints(tuple(as_url(url) for url in settings.endpoints))
        token_hosts = (*settings.token_hosts, *TOKEN_HOSTS.get(name, ()))
        self._policies = {
            url: Policy(
                url,
                token_hosts + TOKEN_HOSTS.get(url.host or "", ()),
                own_addresses,
                settings.redirect_hosts,
                name,
            )
            for url in self._endpoints.urls
        }
        self._auth = Authenticator(
            name, settings, self._send_token_request, emit, single_flight, clock
        )

    @property
    def endpoint_count(self) -> int:
        """The number of endpoints."""
        return len(self._endpoints.urls)

    @asynccontextmanager
    async def send(
        self, request: RegistryRequest, avoid: Collection[str] = ()
    ) -> AsyncIterator[AcceptedResponse]:
        """Send a request, and yield the first accepted response.

        Args:
            request: The request.
            avoid: URLs of endpoints to try last, in this order.

        Raises:
            NotFound, Unauthorized, Denied: all endpoints refused. Unauthorized and Denied take
                precedence, because an endpoint that denies access may have the content.
            UpstreamError: no endpoint sent an accepted response, and at least one could not be
                asked. It is the failure of the last attempt, or ``UpstreamRateLimited`` if any
                endpoint pauses after a 429.
            Draining: the process shuts down.
        """
        retry_deadline, subject = self._clock() + RETRY_BUDGET_S, request.subject
        failure: UpstreamError | None = None
        attempts = failures = 0
        tried: set[URL] = set()
        refusals: dict[URL, MirrorError] = {}
        async with AsyncExitStack() as stack:
            while failures < MAX_ATTEMPTS_PER_REQUEST:
                attempts_before = attempts
                candidates = self._endpoints.candidates(self._clock(), subject, avoid)
                for position, endpoint in enumerate(candidates, 1):
                    now = self._clock()
                    if endpoint in refusals or not self._endpoints.may_request(
                        endpoint, now, subject
                    ):
                        continue  # Another request may have become the probe since.
                    if failures == MAX_ATTEMPTS_PER_REQUEST or (
                        attempts > 1 and now >= retry_deadline
                    ):
                        break
                    attempts += 1
                    is_probe = self._endpoints.circuits[endpoint].begin_request(subject)
                    # Other requests wait for a probe, and another endpoint may respond at once.
                    is_urgent = is_probe or not all(
                        self._endpoints.has_failed(other, now, subject)
                        for other in candidates[position:]
                    )
                    attempt = _Attempt(
                        self._policies[endpoint],
                        request,
                        is_probe=is_probe,
                        is_repeat=endpoint in tried,
                        limit=self._transport.response_limit(request.kind, is_urgent=is_urgent),
                    )
                    tried.add(endpoint)
                    try:
                        response = await stack.enter_async_context(self._run_attempt(attempt))
                    except UpstreamError as error:
                        failure, failures = error, failures + 1
                        continue
                    except Draining:
                        raise
                    except MirrorError as error:
                        refusals[endpoint] = error
                        continue
                    yield response
                    return
                if len(refusals) == len(self._endpoints.urls):
                    raise _final_refusal(refusals.values())
                is_last_round = attempts == attempts_before or failures == MAX_ATTEMPTS_PER_REQUEST
                if is_last_round or self._clock() >= retry_deadline or not is_transient(failure):
                    break
                await asyncio.sleep(backoff_delay(attempts, self._jitter()))
        raise self._final_error(failure, subject)

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
            "",
            Kind.TAGS,
            page=policy.api_url,
            is_accepted=lambda response: response.http.status not in _ACCESS_REFUSED,
        )
        limit = self._transport.response_limit()
        attempt = _Attempt(policy, request, is_probe=False, is_repeat=False, limit=limit)
        async with self._run_attempt(attempt) as response:
            return response.http.status, response.http.headers.get(hdrs.CONTENT_TYPE)

    def _final_error(self, failure: UpstreamError | None, subject: Subject) -> UpstreamError:
        """Choose the error to raise if not all endpoints refused. ``failure``: the last one."""
        now = self._clock()
        pauses = self._endpoints.remaining_pauses(now, subject)
        if pauses and not isinstance(failure, UpstreamRateLimited):
            # A 429 takes precedence over failures of other endpoints.
            delay = min((seconds for seconds in pauses if seconds is not None), default=None)
            return UpstreamRateLimited("the upstream limits the rate", retry_after=delay)
        if failure is not None:
            return failure
        urls = self._endpoints.urls
        blocked = [url for url in urls if not self._endpoints.may_request(url, now, subject)]
        names = " and ".join(map(str, blocked or urls))
        return AllCircuitsOpen(
            f"no request is sent to {names} for a while; last failure: {self._last_failure}"
        )

    @asynccontextmanager
    async def _run_attempt(self, attempt: _Attempt) -> AsyncIterator[AcceptedResponse]:
        """Send the request to one endpoint, and report the outcome to its circuit breaker."""
        async with AsyncExitStack() as stack:
            try:
                response = await self._send_authorized(stack, attempt)
                accepted = AcceptedResponse(
                    response.http,
                    response.destination,
                    response.limits,
                    str(attempt.policy.endpoint),
                    report_success=partial(self._record_outcome, attempt, None),
                    repeat=partial(self._repeat, attempt),
                )
                if response.http.status != 200 and not attempt.request.is_accepted(accepted):
                    raise attempt.refusal or await error_of(response, attempt.request.kind)
                if response.is_cross_origin:
                    # The body comes from a storage behind the endpoint, which has done its part.
                    accepted.report_success()
                yield accepted
            except BaseException as error:
                if isinstance(error, UpstreamError):
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
        return self._run_attempt(again)

    async def _send_authorized(self, stack: AsyncExitStack, attempt: _Attempt) -> Response:
        """Send the request with credentials, as far as the endpoint requires them.

        A refused authorization leads to a request without one. Each further 401 leads to a request
        with the next authorization, as long as there is one.
        """
        url = attempt.url()
        negotiation = Negotiation(self._auth, attempt.policy, attempt.request.repository)
        async with _token_deadline(attempt.limit.deadline):
            header: str | None = await negotiation.first()
        while True:
            response = await self._exchange(stack, attempt, url, header or "")
            if response.is_cross_origin or response.http.status not in _ACCESS_REFUSED:
                negotiation.accept()
                return response
            challenges = response.http.headers.getall(hdrs.WWW_AUTHENTICATE, ())
            async with _token_deadline(attempt.limit.deadline):
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
            follow_redirects=request.follow_redirects,
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
        endpoint, subject = attempt.policy.endpoint, attempt.request.subject
        circuit, is_probe = self._endpoints.circuits[endpoint], attempt.is_probe
        was_open = circuit.is_open
        match error:
            case UpstreamRateLimited():
                circuit.record_success()
                self._endpoints.pauses[endpoint].add(self._clock(), subject, error.retry_after)
            case OutboundRefused() | UpstreamUnavailable(scope=FailureScope.NONE) | Draining():
                circuit.record_cancellation(is_probe=is_probe)
            case UpstreamUnavailable(scope=FailureScope.SUBJECT | FailureScope.ENDPOINT):
                self._last_failure = error.message
                if is_probe or not attempt.is_repeat:
                    circuit.record_failure(
                        self._clock(),
                        subject,
                        is_probe=is_probe,
                        is_unreachable=error.scope is FailureScope.ENDPOINT,
                    )
            case None | MirrorError():
                circuit.record_success()
            case _:  # The task was cancelled, or the reader of the body failed.
                circuit.record_cancellation(is_probe=is_probe)
        if circuit.is_open != was_open:
            self._emit(CircuitChanged(self._name, str(endpoint), circuit.is_open))

    async def _send_token_request(
        self, method: str, url: URL, headers: Mapping[str, str], form: Mapping[str, str] | None
    ) -> TokenResponse:
        """Send a request to a realm that the guard has allowed. Redirects are not followed.

        It runs in a task of its own, so it has a deadline of its own, for its body as well. A
        failure is not one of the endpoint: other repositories may need no token.
        """
        limit = self._transport.response_limit()
        exchange = self._transport.exchange(
            method,
            url,
            headers,
            Policy(url.origin(), upstream=self._name),
            follow_redirects=False,
            form=form,
            limit=limit,
            addresses=realm_rule(url, self._endpoints.urls),
        )
        try:
            async with _token_deadline(limit.deadline), exchange as response:
                body = await read_body(response, MAX_TOKEN_RESPONSE_BYTES)
                return TokenResponse(response.http.status, body, retry_after_of(response.http))
        except UpstreamUnavailable as error:
            if error.scope is FailureScope.ENDPOINT:
                error.scope = FailureScope.SUBJECT
            raise


@asynccontextmanager
async def _token_deadline(deadline: float) -> AsyncIterator[None]:
    """Raise ``UpstreamTimeout`` in the block at ``deadline``, in event loop time."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        message = "no token within the time limit (limits.connect and limits.headers)"
        raise UpstreamTimeout(message, scope=FailureScope.SUBJECT) from error


def _final_refusal(refusals: Collection[MirrorError]) -> MirrorError:
    """Choose the error to raise if all endpoints refused: the first 401 or 403, else a 404."""
    denials = (error for error in refusals if not isinstance(error, NotFound))
    return next(denials, next(iter(refusals)))
