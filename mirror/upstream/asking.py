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

from mirror.config import Upstream
from mirror.events import CircuitChanged, Kind, Observer, RateLimitSeen, UpstreamAnswered
from mirror.oci.errors import (
    MirrorError,
    OutboundRefused,
    Reach,
    UpstreamError,
    UpstreamLeftAlone,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.upstream.answers import error_of, rate_limit_of
from mirror.upstream.auth import TOKEN_LIMIT, Authenticator, Shown, TokenAnswer
from mirror.upstream.endpoints import Endpoints
from mirror.upstream.outbound import TOKEN_HOSTS, Allowed, Policy, Purpose, as_url, judge
from mirror.upstream.retry import ATTEMPTS, BUDGET, backoff, may_pass, retry_after
from mirror.upstream.transport import Answer, Transport, read_body


def nothing_else(answer: Answer) -> bool:
    """Only a 200 is an answer to the question."""
    return False


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a repository, at whichever endpoint."""

    method: str
    repository: Repository
    path: str
    kind: Kind
    headers: Mapping[str, str] = field(default_factory=dict)
    at: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Further headers, for one endpoint only."""
    query: Mapping[str, str] = field(default_factory=dict)
    page: str | None = None
    """The next page, as the answer before this one named it."""
    takes: Callable[[Answer], bool] = nothing_else
    """Which answers are good, beside a 200."""
    follow: bool = True


@dataclass(frozen=True, slots=True)
class Good(Answer):
    """An answer to the question."""

    works: Callable[[], None]
    """Says that its body comes. Otherwise the circuit waits for the end of it."""


@dataclass(slots=True)
class _Attempt:
    """A question, put to one endpoint."""

    endpoint: URL
    question: Question
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
        return f"{self.question.repository.path}/{self.question.path}"


class Asker:
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
        self, question: Question, avoid: Collection[str] = ()
    ) -> AsyncIterator[tuple[Good, URL]]:
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
                    if not circuit.permits(now):
                        continue  # not any more: another request is the one that tries it
                    attempt += 1
                    attempted = _Attempt(
                        endpoint,
                        question,
                        circuit.claim(),
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
        resting = self._endpoints.resting(self._clock())
        if resting and not isinstance(failure, UpstreamRateLimited):
            # Who asks for a pause is listened to, also where another one merely failed.
            named = min((seconds for seconds in resting if seconds is not None), default=None)
            return UpstreamRateLimited("the upstream asked for a pause", retry_after=named)
        return failure or UpstreamLeftAlone("all endpoints have failed; not asked again yet")

    def _url(self, question: Question, policy: Policy) -> URL:
        """Where to ask; every URL passes the guard. Raises ``OutboundRefused``."""
        path = f"{quote(question.repository.path)}/{quote(question.path, safe=':/')}"
        url = URL(f"{policy.endpoint}/v2/{path}", encoded=True).with_query(dict(question.query))
        if question.page is None:
            verdict = judge(str(url), Purpose.ENDPOINT, url, policy)
        else:
            verdict = judge(question.page, Purpose.NEXT_PAGE, url, policy)
        if not isinstance(verdict, Allowed):
            what = "endpoint" if question.page is None else "next page"
            raise OutboundRefused(f"{what} refused: {verdict.why}")
        return verdict.url

    @asynccontextmanager
    async def _attempt(self, attempt: _Attempt) -> AsyncIterator[Good]:
        """One endpoint, with what it wants of credentials; its circuit learns how it went."""
        async with AsyncExitStack() as stack:
            try:
                answer = await self._authorized(stack, attempt)
                await self._judge_status(answer, attempt.question)
                good = Good(answer.response, answer.redirected, partial(self._learn, attempt, None))
                if answer.redirected:
                    good.works()  # how the body comes is not the endpoint's business
                yield good
            except BaseException as error:
                if isinstance(error, UpstreamError):
                    error.endpoint = str(attempt.endpoint)
                self._learn(attempt, error)
                raise
            self._learn(attempt, None)

    async def _authorized(self, stack: AsyncExitStack, attempt: _Attempt) -> Answer:
        """The answer to what the endpoint wants of credentials, as far as there are any."""
        endpoint, repository = attempt.endpoint, attempt.question.repository
        policy = Policy(endpoint, self._token_hosts, self._own, self._transport.private_hosts)
        url = self._url(attempt.question, policy)
        shown = await _in_time(attempt, self._auth.authorization(policy, repository))
        answer = await self._send(stack, attempt, url, policy, shown)
        for _ in range(2):
            if answer.response.status != 401 or answer.redirected:
                break
            wanted = answer.response.headers.getall(hdrs.WWW_AUTHENTICATE, ())
            again = await _in_time(
                attempt, self._auth.challenged(wanted, policy, repository, shown)
            )
            if again is None:
                break
            shown = again
            answer = await self._send(stack, attempt, url, policy, shown)
        return answer

    async def _send(
        self,
        stack: AsyncExitStack,
        attempt: _Attempt,
        url: URL,
        policy: Policy,
        shown: Shown | None,
    ) -> Answer:
        """One exchange; the one before it on ``stack`` is over."""
        await stack.aclose()
        question, until = attempt.question, attempt.until
        headers = {**question.headers, **question.at.get(str(policy.endpoint), {})}
        if shown is not None:
            headers["Authorization"] = shown.header
        begun, status, error = self._clock(), 0, ""
        try:
            answer = await stack.enter_async_context(
                self._transport.exchange(
                    question.method, url, headers, policy, follow=question.follow, until=until
                )
            )
            status = answer.response.status
            self._notice(answer.response.headers)
            return answer
        except MirrorError as failed:
            error = failed.message
            raise
        finally:
            billed = question.method == "GET" and question.kind is Kind.MANIFEST
            self._emit(
                UpstreamAnswered(
                    self._name,
                    str(policy.endpoint),
                    question.method,
                    question.kind,
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

    async def _judge_status(self, answer: Answer, question: Question) -> None:
        response = answer.response
        if response.status == 200 or question.takes(answer):
            return
        pause = retry_after(response.headers.get(hdrs.RETRY_AFTER), time.time())
        raise await error_of(response, question.kind, answer.redirected, pause)

    def _learn(self, attempt: _Attempt, error: BaseException | None) -> None:
        """A question counts once at each endpoint, however often it is tried there."""
        if attempt.learned:
            return
        attempt.learned = True
        circuit, probe = self._endpoints.circuits[attempt.endpoint], attempt.probe
        was_open = circuit.is_open
        match error:
            case UpstreamRateLimited():
                circuit.rest(self._clock(), error.retry_after)
            case OutboundRefused() | UpstreamUnavailable(reach=Reach.NOTHING):
                circuit.abandoned(probe=probe)
            case UpstreamUnavailable(reach=Reach.PATH | Reach.ENDPOINT):
                path = attempt.path if error.reach is Reach.PATH else None
                if probe or not attempt.again:
                    circuit.failed(self._clock(), probe=probe, path=path)
            case None | MirrorError():
                circuit.succeeded()
            case _:
                circuit.abandoned(probe=probe)  # whoever asked left
        if circuit.is_open != was_open:
            self._emit(CircuitChanged(self._name, str(attempt.endpoint), circuit.is_open))

    async def _ask_token_service(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
    ) -> TokenAnswer:
        """An exchange with a realm that the guard has allowed; its redirects are not followed."""
        policy = Policy(url.origin())
        async with self._transport.exchange(
            method, url, headers, policy, follow=False, form=form
        ) as answer:
            response = answer.response
            pause = retry_after(response.headers.get(hdrs.RETRY_AFTER), time.time())
            return TokenAnswer(response.status, await read_body(response, TOKEN_LIMIT), pause)


async def _in_time(attempt: _Attempt, token: Awaitable[Shown | None]) -> Shown | None:
    """What is shown to an endpoint, if it is there before the attempt is over."""
    try:
        async with asyncio.timeout_at(attempt.until):
            return await token
    except TimeoutError as error:
        message = "no token within the time limit"
        raise UpstreamTimeout(message, reach=Reach.ENDPOINT) from error
