"""Failover: send one request to the endpoints of an upstream until one sends an accepted response.

Lives here: the order of the attempts, retries within their limits, credentials where an endpoint
requires them, and reports to the circuit breakers. Must not know: what is requested, how a response
is read.

Theory of operation. A round tries each endpoint that its circuit breaker permits, once. A failure
leads to the next endpoint. A refusal (401, 403, 404) is final, because an endpoint that works has
responded. If the last failure of a round is transient, another round begins after a delay. All
rounds together have ``MAX_ATTEMPTS_PER_REQUEST`` attempts and ``RETRY_BUDGET_S`` seconds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
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
    OutboundRefused,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.auth import (
    MAX_TOKEN_RESPONSE_BYTES,
    Authenticator,
    SentAuthorization,
    TokenResponse,
)
from mirror.upstream.endpoints import Endpoints
from mirror.upstream.outbound import TOKEN_HOSTS, Allowed, Policy, UrlSource, as_url, check_url
from mirror.upstream.retry import (
    MAX_ATTEMPTS_PER_REQUEST,
    RETRY_BUDGET_S,
    backoff_delay,
    is_transient,
)
from mirror.upstream.transport import (
    Response,
    Transport,
    error_of,
    parse_rate_limit,
    read_body,
    retry_after_of,
)


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
    is_accepted: Callable[[Response], bool] = lambda response: False
    """Returns True for a status other than 200 that is no error. By default no status is one."""
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


@dataclass(slots=True)
class _Attempt:
    """One request to one endpoint."""

    policy: Policy
    request: RegistryRequest
    is_probe: bool
    """Whether it is the probe of a half-open circuit."""
    is_repeat: bool
    """Whether the same request was sent to this endpoint before."""
    deadline: float
    """Event loop time at which response headers must be in, with tokens and redirects."""
    is_recorded: bool = False
    """Whether the circuit breaker knows the outcome."""

    @property
    def path(self) -> str:
        """Path of the request, with its repository."""
        return f"{self.request.repository.path}/{self.request.path}"

    def url(self) -> URL:
        """Return the URL of the request. Raises ``OutboundRefused`` if the guard refuses it."""
        path = f"{quote(self.request.repository.path)}/{quote(self.request.path, safe=':/')}"
        query = dict(self.request.query)
        url = URL(f"{self.policy.endpoint}/v2/{path}", encoded=True).with_query(query)
        target, source, name = str(url), UrlSource.ENDPOINT, "endpoint"
        if self.request.page is not None:
            target, source, name = self.request.page, UrlSource.NEXT_PAGE, "next page"
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
            url: Policy(url, token_hosts, own_addresses, transport.private_hosts)
            for url in self._endpoints.urls
        }
        self._auth = Authenticator(
            name, settings, self._send_token_request, emit, single_flight, clock
        )

    @asynccontextmanager
    async def send(
        self, request: RegistryRequest, avoid: Collection[str] = ()
    ) -> AsyncIterator[AcceptedResponse]:
        """Send a request, and yield the first accepted response.

        Args:
            request: The request.
            avoid: URLs of endpoints to try last, in this order. They are known to have the content.
                A 401, 403 or 404 from any other endpoint is final only after these have responded
                with one, too.

        Raises:
            NotFound, Unauthorized, Denied: an endpoint refused.
            UpstreamError: no endpoint sent an accepted response. It is the failure of the last
                attempt, or ``UpstreamRateLimited`` if any endpoint pauses after a 429.
            Draining: the process shuts down.
        """
        retry_deadline = self._clock() + RETRY_BUDGET_S
        failure: UpstreamError | None = None
        attempts = 0
        tried: set[URL] = set()
        holders = {url for url in self._endpoints.urls if str(url) in avoid}
        refused: set[URL] = set()
        async with AsyncExitStack() as stack:
            while attempts < MAX_ATTEMPTS_PER_REQUEST:
                attempts_before = attempts
                candidates = self._endpoints.candidates(self._clock(), avoid)
                for endpoint in candidates[: MAX_ATTEMPTS_PER_REQUEST - attempts]:
                    circuit, now = self._endpoints.circuits[endpoint], self._clock()
                    if attempts > 1 and now >= retry_deadline:
                        break
                    if not circuit.may_request(now):
                        continue  # Another request has become the probe since.
                    attempts += 1
                    attempt = _Attempt(
                        self._policies[endpoint],
                        request,
                        is_probe=circuit.begin_request(),
                        is_repeat=endpoint in tried,
                        deadline=self._transport.response_deadline(),
                    )
                    tried.add(endpoint)
                    try:
                        response = await stack.enter_async_context(self._run_attempt(attempt))
                    except UpstreamError as error:
                        failure = error
                        continue
                    except Draining:
                        raise
                    except MirrorError:
                        refused.add(endpoint)
                        if holders <= refused:
                            raise
                        continue
                    yield response
                    return
                is_last_round = attempts in (attempts_before, MAX_ATTEMPTS_PER_REQUEST)
                if is_last_round or self._clock() >= retry_deadline or not is_transient(failure):
                    break
                await asyncio.sleep(backoff_delay(attempts, self._jitter()))
        raise self._final_error(failure)

    def _final_error(self, failure: UpstreamError | None) -> UpstreamError:
        """Choose the error to raise if no response was accepted. ``failure``: the last one."""
        pauses = self._endpoints.remaining_pauses(self._clock())
        if pauses and not isinstance(failure, UpstreamRateLimited):
            # A 429 takes precedence over failures of other endpoints.
            delay = min((seconds for seconds in pauses if seconds is not None), default=None)
            return UpstreamRateLimited("the upstream limits the rate", retry_after=delay)
        return failure or AllCircuitsOpen("all endpoints have failed and are not tried for a while")

    @asynccontextmanager
    async def _run_attempt(self, attempt: _Attempt) -> AsyncIterator[AcceptedResponse]:
        """Send the request to one endpoint, and report the outcome to its circuit breaker."""
        async with AsyncExitStack() as stack:
            try:
                response = await self._send_authorized(stack, attempt)
                if response.http.status != 200 and not attempt.request.is_accepted(response):
                    raise await error_of(response, attempt.request.kind)
                accepted = AcceptedResponse(
                    response.http,
                    response.is_cross_origin,
                    str(attempt.policy.endpoint),
                    report_success=partial(self._record_outcome, attempt, None),
                )
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

    async def _send_authorized(self, stack: AsyncExitStack, attempt: _Attempt) -> Response:
        """Send the request with credentials, as far as the endpoint requires them.

        A 401 leads to at most two more requests: a token may have been revoked, then its login.
        """
        policy, repository, url = attempt.policy, attempt.request.repository, attempt.url()
        async with _token_deadline(attempt.deadline):
            sent = await self._auth.authorize_preemptively(policy, repository)
        response = await self._exchange(stack, attempt, url, sent)
        for _ in range(2):
            if response.http.status != 401 or response.is_cross_origin:
                break
            challenges = response.http.headers.getall(hdrs.WWW_AUTHENTICATE, ())
            async with _token_deadline(attempt.deadline):
                authorization = await self._auth.authorize_after_challenge(
                    challenges, policy, repository, sent
                )
            if authorization is None:
                break
            sent = authorization
            response = await self._exchange(stack, attempt, url, sent)
        return response

    async def _exchange(
        self,
        stack: AsyncExitStack,
        attempt: _Attempt,
        url: URL,
        authorization: SentAuthorization | None,
    ) -> Response:
        """Run one exchange on ``stack``, in place of the one before it, and emit its event."""
        await stack.aclose()
        request, endpoint = attempt.request, str(attempt.policy.endpoint)
        headers = {**request.headers, **request.endpoint_headers.get(endpoint, {})}
        if authorization is not None:
            headers["Authorization"] = authorization.header
        exchange = self._transport.exchange(
            request.method,
            url,
            headers,
            attempt.policy,
            follow_redirects=request.follow_redirects,
            deadline=attempt.deadline,
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
        circuit, is_probe = self._endpoints.circuits[attempt.policy.endpoint], attempt.is_probe
        was_open = circuit.is_open
        match error:
            case UpstreamRateLimited():
                circuit.back_off(self._clock(), error.retry_after)
            case OutboundRefused() | UpstreamUnavailable(scope=FailureScope.NONE) | Draining():
                circuit.record_cancellation(is_probe=is_probe)
            case UpstreamUnavailable(scope=FailureScope.PATH | FailureScope.ENDPOINT):
                path = attempt.path if error.scope is FailureScope.PATH else None
                if is_probe or not attempt.is_repeat:
                    circuit.record_failure(self._clock(), is_probe=is_probe, path=path)
            case None | MirrorError():
                circuit.record_success()
            case _:  # The task was cancelled, or the reader of the body failed.
                circuit.record_cancellation(is_probe=is_probe)
        if circuit.is_open != was_open:
            self._emit(CircuitChanged(self._name, str(attempt.policy.endpoint), circuit.is_open))

    async def _send_token_request(
        self, method: str, url: URL, headers: Mapping[str, str], form: Mapping[str, str] | None
    ) -> TokenResponse:
        """Send a request to a realm that the guard has allowed. Redirects are not followed.

        It runs in a task of its own, so it has a deadline of its own, for its body as well.
        """
        policy = Policy(url.origin())
        exchange = self._transport.exchange(
            method, url, headers, policy, follow_redirects=False, form=form
        )
        async with _token_deadline(self._transport.response_deadline()), exchange as response:
            body = await read_body(response.http, MAX_TOKEN_RESPONSE_BYTES)
            return TokenResponse(response.http.status, body, retry_after_of(response.http))


@asynccontextmanager
async def _token_deadline(deadline: float) -> AsyncIterator[None]:
    """Raise ``UpstreamTimeout`` in the block at ``deadline``, in event loop time."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        message = "no token within the time limit"
        raise UpstreamTimeout(message, scope=FailureScope.ENDPOINT) from error
