"""Asking: one question, put to the endpoints of an upstream until one of them answers.

Lives here: failover and retries within the attempts there are, credentials where an endpoint wants
them, what its circuit learns. Must not know: what is asked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import quote

from aiohttp import hdrs
from multidict import CIMultiDictProxy
from yarl import URL

from mirror.config.settings import Upstream
from mirror.observability.events import (
    CircuitChanged,
    Kind,
    Observer,
    RateLimitSeen,
    UpstreamResponded,
)
from mirror.oci.errors import (
    AllCircuitsOpen,
    FailureScope,
    MirrorError,
    OutboundRefused,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.upstream.auth import TOKEN_LIMIT, Authenticator, SentAuthorization, TokenResponse
from mirror.upstream.endpoints import Endpoints
from mirror.upstream.outbound import TOKEN_HOSTS, Allowed, Policy, Purpose, as_url, check_url
from mirror.upstream.responses import error_of, rate_limit_of
from mirror.upstream.retry import ATTEMPTS, BUDGET, backoff, may_pass, retry_after
from mirror.upstream.transport import Response, Transport, read_body


def accept_only_200(answer: Response) -> bool:
    """Only a 200 is an answer to the question."""
    return False


@dataclass(frozen=True, slots=True)
class RegistryRequest:
    """What is asked of a repository, at whichever endpoint."""

    method: str
    repository: Repository
    path: str
    kind: Kind
    headers: Mapping[str, str] = field(default_factory=dict)
    endpoint_headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Further headers, for one endpoint only."""
    query: Mapping[str, str] = field(default_factory=dict)
    page: str | None = None
    """The next page, as the answer before this one named it."""
    is_accepted: Callable[[Response], bool] = accept_only_200
    """Which answers are good, beside a 200."""
    follow: bool = True


@dataclass(frozen=True, slots=True)
class AcceptedResponse(Response):
    """An answer to the question."""

    report_success: Callable[[], None]
    """Says that its body comes. Otherwise the circuit waits for the end of it."""


@dataclass(slots=True)
class _Attempt:
    """A question, put to one endpoint."""

    endpoint: URL
    request: RegistryRequest
    probe: bool
    """It is the one try of a circuit that is half open."""
    again: bool
    """The question was put to this endpoint before."""
    until: float
    """The time it has, with tokens and redirects and all, by the event loop's clock."""
    learned: bool = False
    """The circuit knows how it went."""

    @property
    def path(self) -> str:
        """What was asked for."""
        return f"{self.request.repository.path}/{self.request.path}"


class FailoverClient:
    """Puts questions to one upstream."""

    def __init__(
        self,
        name: str,
        settings: Upstream,
        transport: Transport,
        emit: Observer,
        own: Collection[tuple[str, int]] = (),
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._name = name
        self._transport = transport
        self._emit = emit
        self._own = own
        self._clock = clock
        self._jitter = jitter
        self._token_hosts = (*settings.token_hosts, *TOKEN_HOSTS.get(name, ()))
        self._endpoints = Endpoints(tuple(as_url(url) for url in settings.endpoints))
        self._auth = Authenticator(name, settings.credentials, self._ask_token_service, emit, clock)

    async def close(self) -> None:
        """Close connections."""
        await self._transport.close()

    @asynccontextmanager
    async def ask(
        self, request: RegistryRequest, avoid: Collection[str] = ()
    ) -> AsyncIterator[tuple[AcceptedResponse, URL]]:
        """The first good answer of the endpoints in order, within the attempts there are.

        A 4xx is the answer of an endpoint that works: the next one is not asked for another. But
        those in ``avoid`` had what is asked for: no other one's no counts until they say it too.
        """
        deadline = self._clock() + BUDGET
        failure: MirrorError | None = None
        attempt = 0
        asked: set[URL] = set()
        had = {url for url in self._endpoints.urls if str(url) in avoid}
        refused: set[URL] = set()
        async with AsyncExitStack() as stack:
            while attempt < ATTEMPTS:
                before = attempt
                candidates = self._endpoints.candidates(self._clock(), avoid)
                for endpoint in candidates[: ATTEMPTS - attempt]:
                    circuit, now = self._endpoints.circuits[endpoint], self._clock()
                    if attempt > 1 and now >= deadline:
                        break
                    if not circuit.may_request(now):
                        continue  # not any more: another request is the one that tries it
                    attempt += 1
                    attempted = _Attempt(
                        endpoint,
                        request,
                        circuit.begin_request(),
                        again=endpoint in asked,
                        until=self._transport.deadline(),
                    )
                    asked.add(endpoint)
                    try:
                        answer = await stack.enter_async_context(self._attempt(attempted))
                    except UpstreamError as error:
                        failure = error
                        continue
                    except MirrorError:
                        refused.add(endpoint)
                        if had <= refused:
                            raise
                        continue
                    yield answer, endpoint
                    return
                over = attempt in (before, ATTEMPTS) or self._clock() >= deadline
                if over or not may_pass(failure):
                    break
                await asyncio.sleep(backoff(attempt, self._jitter()))
        raise self._verdict(failure)

    def _verdict(self, failure: MirrorError | None) -> MirrorError:
        """What to say when no endpoint has answered; the last failure, if any was asked."""
        backing_off = self._endpoints.backing_off(self._clock())
        if backing_off and not isinstance(failure, UpstreamRateLimited):
            # Who asks for a pause is listened to, also where another one merely failed.
            named = min((seconds for seconds in backing_off if seconds is not None), default=None)
            return UpstreamRateLimited("the upstream asked for a pause", retry_after=named)
        return failure or AllCircuitsOpen("all endpoints have failed; not asked again yet")

    def _url(self, request: RegistryRequest, policy: Policy) -> URL:
        """Where to ask; every URL passes the guard. Raises ``OutboundRefused``."""
        path = f"{quote(request.repository.path)}/{quote(request.path, safe=':/')}"
        url = URL(f"{policy.endpoint}/v2/{path}", encoded=True).with_query(dict(request.query))
        if request.page is None:
            verdict = check_url(str(url), Purpose.ENDPOINT, url, policy)
        else:
            verdict = check_url(request.page, Purpose.NEXT_PAGE, url, policy)
        if not isinstance(verdict, Allowed):
            what = "endpoint" if request.page is None else "next page"
            raise OutboundRefused(f"{what} refused: {verdict.why}")
        return verdict.url

    @asynccontextmanager
    async def _attempt(self, attempt: _Attempt) -> AsyncIterator[AcceptedResponse]:
        """One endpoint, with what it wants of credentials; its circuit learns how it went."""
        async with AsyncExitStack() as stack:
            try:
                answer = await self._authorized(stack, attempt)
                await self._judge_status(answer, attempt.request)
                good = AcceptedResponse(
                    answer.response, answer.redirected, partial(self._learn, attempt, None)
                )
                if answer.redirected:
                    good.report_success()  # how the body comes is not the endpoint's business
                yield good
            except BaseException as error:
                if isinstance(error, UpstreamError):
                    error.endpoint = str(attempt.endpoint)
                self._learn(attempt, error)
                raise
            self._learn(attempt, None)

    async def _authorized(self, stack: AsyncExitStack, attempt: _Attempt) -> Response:
        """The answer to what the endpoint wants of credentials, as far as there are any."""
        endpoint, repository = attempt.endpoint, attempt.request.repository
        policy = Policy(endpoint, self._token_hosts, self._own, self._transport.private_hosts)
        url = self._url(attempt.request, policy)
        sent = await _in_time(attempt, self._auth.authorization(policy, repository))
        answer = await self._send(stack, attempt, url, policy, sent)
        for _ in range(2):
            if answer.response.status != 401 or answer.redirected:
                break
            wanted = answer.response.headers.getall(hdrs.WWW_AUTHENTICATE, ())
            again = await _in_time(attempt, self._auth.challenged(wanted, policy, repository, sent))
            if again is None:
                break
            sent = again
            answer = await self._send(stack, attempt, url, policy, sent)
        return answer

    async def _send(
        self,
        stack: AsyncExitStack,
        attempt: _Attempt,
        url: URL,
        policy: Policy,
        sent: SentAuthorization | None,
    ) -> Response:
        """One exchange; the one before it on ``stack`` is over."""
        await stack.aclose()
        request, until = attempt.request, attempt.until
        headers = {**request.headers, **request.endpoint_headers.get(str(policy.endpoint), {})}
        if sent is not None:
            headers["Authorization"] = sent.header
        begun, status, error = self._clock(), 0, ""
        try:
            answer = await stack.enter_async_context(
                self._transport.exchange(
                    request.method, url, headers, policy, follow=request.follow, until=until
                )
            )
            status = answer.response.status
            self._notice(answer.response.headers)
            return answer
        except MirrorError as failed:
            error = failed.message
            raise
        finally:
            billed = request.method == "GET" and request.kind is Kind.MANIFEST
            self._emit(
                UpstreamResponded(
                    self._name,
                    str(policy.endpoint),
                    request.method,
                    request.kind,
                    status,
                    self._clock() - begun,
                    billed and status in (200, 206),
                    error,
                )
            )

    def _notice(self, headers: CIMultiDictProxy[str]) -> None:
        found = rate_limit_of(headers)
        if found is not None:
            self._emit(RateLimitSeen(self._name, *found))

    async def _judge_status(self, answer: Response, request: RegistryRequest) -> None:
        response = answer.response
        if response.status == 200 or request.is_accepted(answer):
            return
        pause = retry_after(response.headers.get(hdrs.RETRY_AFTER), time.time())
        raise await error_of(response, request.kind, answer.redirected, pause)

    def _learn(self, attempt: _Attempt, error: BaseException | None) -> None:
        """A question counts once at each endpoint, however often it is tried there."""
        if attempt.learned:
            return
        attempt.learned = True
        circuit, probe = self._endpoints.circuits[attempt.endpoint], attempt.probe
        was_open = circuit.is_open
        match error:
            case UpstreamRateLimited():
                circuit.back_off(self._clock(), error.retry_after)
            case OutboundRefused() | UpstreamUnavailable(scope=FailureScope.NONE):
                circuit.cancelled(probe=probe)
            case UpstreamUnavailable(scope=FailureScope.PATH | FailureScope.ENDPOINT):
                path = attempt.path if error.scope is FailureScope.PATH else None
                if probe or not attempt.again:
                    circuit.failed(self._clock(), probe=probe, path=path)
            case None | MirrorError():
                circuit.succeeded()
            case _:
                circuit.cancelled(probe=probe)  # whoever asked left
        if circuit.is_open != was_open:
            self._emit(CircuitChanged(self._name, str(attempt.endpoint), circuit.is_open))

    async def _ask_token_service(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
    ) -> TokenResponse:
        """An exchange with a realm that the guard has allowed; its redirects are not followed."""
        policy = Policy(url.origin())
        async with self._transport.exchange(
            method, url, headers, policy, follow=False, form=form
        ) as answer:
            response = answer.response
            pause = retry_after(response.headers.get(hdrs.RETRY_AFTER), time.time())
            return TokenResponse(response.status, await read_body(response, TOKEN_LIMIT), pause)


async def _in_time(
    attempt: _Attempt, token: Awaitable[SentAuthorization | None]
) -> SentAuthorization | None:
    """What is shown to an endpoint, if it is there before the attempt is over."""
    try:
        async with asyncio.timeout_at(attempt.until):
            return await token
    except TimeoutError as error:
        message = "no token within the time limit"
        raise UpstreamTimeout(message, scope=FailureScope.ENDPOINT) from error
