"""Asking: one question, put to the endpoints of an upstream until one of them answers.

Lives here: failover and retries within the attempts there are, credentials where an endpoint wants
them, what its circuit learns. Must not know: what is asked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import quote

from aiohttp import hdrs
from multidict import CIMultiDictProxy
from yarl import URL

from mirror.config import Upstream
from mirror.events import CircuitChanged, Kind, Observer, RateLimitSeen, UpstreamAnswered
from mirror.oci.errors import (
    MirrorError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.upstream.answers import error_of, rate_limit_of
from mirror.upstream.auth import TOKEN_LIMIT, Authenticator
from mirror.upstream.endpoints import Endpoints
from mirror.upstream.outbound import TOKEN_HOSTS, Allowed, Policy, Purpose, as_url, judge
from mirror.upstream.retry import ATTEMPTS, BUDGET, backoff, retry_after
from mirror.upstream.transport import Answer, Transport, read_body


class Asker:
    """Puts questions to one upstream."""

    def __init__(
        self,
        name: str,
        settings: Upstream,
        transport: Transport,
        emit: Observer,
        own: Collection[tuple[str, int]] = (),
    ) -> None:
        self._name = name
        self._transport = transport
        self._emit = emit
        self._own = own
        self._token_hosts = (*settings.token_hosts, *TOKEN_HOSTS.get(name, ()))
        self._endpoints = Endpoints(tuple(as_url(url) for url in settings.endpoints))
        self._auth = Authenticator(name, settings.credentials, self._ask_token_service, emit)

    async def close(self) -> None:
        """Close connections."""
        await self._transport.close()

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        repository: Repository,
        path: str,
        kind: Kind,
        headers: Mapping[str, str],
        *,
        query: Mapping[str, str] | None = None,
        page: str | None = None,
        accepted: Collection[int] = (),
        avoid: Collection[str] = (),
        follow: bool = True,
    ) -> AsyncIterator[tuple[Answer, URL]]:
        """The first good answer of the endpoints in order, within the attempts there are.

        A 4xx is the answer of an endpoint that works: the next one is not asked for another.
        """
        deadline = time.monotonic() + BUDGET
        failure: MirrorError | None = None
        attempt = 0
        async with AsyncExitStack() as stack:
            while attempt < ATTEMPTS and (attempt == 0 or time.monotonic() < deadline):
                candidates = self._endpoints.candidates(time.monotonic(), avoid)
                for endpoint in candidates[: ATTEMPTS - attempt]:
                    attempt += 1
                    url = self._url(endpoint, repository, path, query, page)
                    try:
                        answer = await stack.enter_async_context(
                            self._attempt(
                                method, url, endpoint, repository, kind, headers, accepted, follow
                            )
                        )
                    except UpstreamError as error:
                        failure = error
                        continue
                    yield answer, endpoint
                    return
                if not candidates or not _may_pass(failure):
                    break
                if attempt < ATTEMPTS:
                    await asyncio.sleep(backoff(attempt, random.random()))  # noqa: S311 - jitter
        raise failure or self._all_closed()

    def _all_closed(self) -> MirrorError:
        rest = self._endpoints.rests(time.monotonic())
        if rest is not None:
            return UpstreamRateLimited("the upstream asked for a pause", retry_after=rest)
        return UpstreamUnavailable("all endpoints have failed; not asked again yet")

    def _policy(self, endpoint: URL) -> Policy:
        return Policy(endpoint, self._token_hosts, self._own)

    def _url(
        self,
        endpoint: URL,
        repository: Repository,
        path: str,
        query: Mapping[str, str] | None,
        page: str | None,
    ) -> URL:
        base = f"{endpoint}/v2/{quote(repository.path)}/{quote(path, safe=':/')}"
        url = URL(base, encoded=True).with_query(dict(query or {}))
        if page is None:
            return url
        verdict = judge(page, Purpose.NEXT_PAGE, url, self._policy(endpoint))
        if not isinstance(verdict, Allowed):
            raise UpstreamProtocolError(f"next page refused: {verdict.why}")
        return verdict.url

    @asynccontextmanager
    async def _attempt(
        self,
        method: str,
        url: URL,
        endpoint: URL,
        repository: Repository,
        kind: Kind,
        headers: Mapping[str, str],
        accepted: Collection[int],
        follow: bool,
    ) -> AsyncIterator[Answer]:
        """One endpoint, with what it wants of credentials; its circuit learns how it went."""
        circuit = self._endpoints.circuits[endpoint]
        circuit.claim(time.monotonic())
        policy = self._policy(endpoint)
        async with AsyncExitStack() as stack:
            try:
                shown = await self._auth.authorization(policy, repository)
                answer = await self._send(
                    stack, method, url, headers, shown, policy, endpoint, kind, follow
                )
                for _ in range(2):
                    if answer.response.status != 401 or answer.redirected:
                        break
                    wanted = answer.response.headers.getall(hdrs.WWW_AUTHENTICATE, ())
                    shown = await self._auth.challenged(wanted, policy, repository, shown)
                    if shown is None:
                        break
                    answer = await self._send(
                        stack, method, url, headers, shown, policy, endpoint, kind, follow
                    )
                if answer.redirected and answer.response.status in (401, 403):
                    # A signed URL that has expired, or refuses this method: sign it anew.
                    answer = await self._send(
                        stack, method, url, headers, shown, policy, endpoint, kind, follow
                    )
                await self._judge_status(answer, kind, accepted)
            except UpstreamError as error:
                self._learn(endpoint, error)
                raise
            except MirrorError:
                self._learn(endpoint, None)
                raise
            self._learn(endpoint, None)
            yield answer

    async def _send(
        self,
        stack: AsyncExitStack,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        shown: str | None,
        policy: Policy,
        endpoint: URL,
        kind: Kind,
        follow: bool,
    ) -> Answer:
        sent = {**headers, "Authorization": shown} if shown is not None else headers
        begun, status, error = time.monotonic(), 0, ""
        try:
            answer = await stack.enter_async_context(
                self._transport.exchange(method, url, sent, policy, follow=follow)
            )
            status = answer.response.status
            self._notice(answer.response.headers)
            return answer
        except MirrorError as failed:
            error = failed.message
            raise
        finally:
            seconds = time.monotonic() - begun
            billed = method == "GET" and kind is Kind.MANIFEST and status in (200, 206)
            self._emit(
                UpstreamAnswered(
                    self._name, str(endpoint), method, kind, status, seconds, billed, error
                )
            )

    def _notice(self, headers: CIMultiDictProxy[str]) -> None:
        found = rate_limit_of(headers)
        if found is not None:
            self._emit(RateLimitSeen(self._name, *found))

    async def _judge_status(self, answer: Answer, kind: Kind, accepted: Collection[int]) -> None:
        response = answer.response
        if response.status == 200 or response.status in accepted:
            return
        pause = retry_after(response.headers.get(hdrs.RETRY_AFTER), time.time())
        raise await error_of(response, kind, answer.redirected, pause)

    def _learn(self, endpoint: URL, error: UpstreamError | None) -> None:
        circuit = self._endpoints.circuits[endpoint]
        was_open = circuit.is_open
        match error:
            case UpstreamRateLimited():
                circuit.rest(time.monotonic(), error.retry_after)
            case UpstreamUnavailable():
                circuit.failed(time.monotonic())
            case _:
                circuit.succeeded()
        if circuit.is_open != was_open:
            self._emit(CircuitChanged(self._name, str(endpoint), circuit.is_open))

    async def _ask_token_service(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
    ) -> tuple[int, bytes]:
        """An exchange with a realm that the guard has allowed; its redirects are not followed."""
        policy = Policy(url.origin())
        async with self._transport.exchange(
            method, url, headers, policy, follow=False, form=form
        ) as answer:
            return answer.response.status, await read_body(answer.response, TOKEN_LIMIT)


def _may_pass(error: MirrorError | None) -> bool:
    """Whether the same endpoints may be asked again at once: not those that are slow, or say no."""
    return isinstance(error, UpstreamUnavailable) and not isinstance(
        error, UpstreamRateLimited | UpstreamTimeout
    )
