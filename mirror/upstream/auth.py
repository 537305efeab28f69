"""Tokens: asked for once however many need one, kept by who asks whom for what.

Lives here: what follows a challenge (Distribution, ``spec/auth/token.md``), the cache of tokens.
Must not know: how requests are sent, which requests there are.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from yarl import URL

from mirror.config.settings import Credentials
from mirror.observability.events import Observer, TokenFetched
from mirror.oci.challenge import Basic, Bearer, parse_challenges
from mirror.oci.errors import (
    Denied,
    MirrorError,
    OutboundRefused,
    Unauthorized,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.upstream.credentials import CredentialLookup, Login, Logins
from mirror.upstream.outbound import Allowed, Policy, Purpose, check_url
from mirror.upstream.shared_value import SharedValue

DEFAULT_LIFETIME: Final = 60.0
_LONGEST_LIFETIME: Final = 3600.0
_MARGIN: Final = 0.1
"""Part of a lifetime at whose begin a token is asked for anew, before it ends in mid-transfer."""
TOKEN_LIMIT: Final = 64 * 1024
_KEPT: Final = 10_000


@dataclass(frozen=True, slots=True)
class TokenResponse:
    """What a token service answers. ``pause``: seconds that it asks to be left alone for."""

    status: int
    body: bytes = field(repr=False)
    pause: float | None = None


Exchange: TypeAlias = Callable[
    [str, URL, Mapping[str, str], Mapping[str, str] | None], Awaitable[TokenResponse]
]
"""(method, url, headers, form) to an answer; a body of more than ``TOKEN_LIMIT`` is an error."""


@dataclass(frozen=True, slots=True)
class SentAuthorization:
    """An ``Authorization`` header, and the look-up of credentials that is behind it."""

    header: str = field(repr=False)
    found: CredentialLookup


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token, good until ``expires`` (monotonic seconds)."""

    sent: SentAuthorization
    expires: float


class Authenticator:
    """Gives ``Authorization`` headers for one upstream."""

    def __init__(
        self,
        upstream: str,
        credentials: Credentials,
        exchange: Exchange,
        emit: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._upstream = upstream
        self._logins = Logins(credentials, upstream, clock)
        self._exchange = exchange
        self._emit = emit
        self._clock = clock
        self._schemes: dict[URL, Bearer | Basic] = {}
        self._tokens: OrderedDict[tuple[str, str, str, str], SharedValue[Token]] = OrderedDict()

    async def authorization(
        self, policy: Policy, repository: Repository
    ) -> SentAuthorization | None:
        """What to begin with: what the endpoint wanted the last time, if anything.

        Raises what :meth:`challenged` raises. The endpoint is then asked anew what it wants: its
        token service may have moved.
        """
        scheme = self._schemes.get(policy.endpoint)
        if scheme is None:
            return None
        try:
            return await self._answer(scheme, policy, repository, None)
        except (UpstreamError, asyncio.CancelledError):  # it may take too long as well
            if self._schemes.get(policy.endpoint) is scheme:
                del self._schemes[policy.endpoint]
            raise

    async def challenged(
        self,
        headers: Sequence[str],
        policy: Policy,
        repository: Repository,
        refused: SentAuthorization | None,
    ) -> SentAuthorization | None:
        """What answers a 401 (``WWW-Authenticate``); ``refused`` was no good.

        None: there is nothing to answer it with. Raises ``Unauthorized`` or ``Denied`` where the
        token service says no, ``OutboundRefused`` for a realm that is not to be asked,
        ``UpstreamRateLimited`` where it asks for a pause, and ``UpstreamUnavailable`` where it
        cannot be asked.
        """
        challenges = parse_challenges(headers)
        bearer = next((c for c in challenges if isinstance(c, Bearer)), None)
        scheme = bearer or next((c for c in challenges if isinstance(c, Basic)), None)
        if scheme is None:
            return None
        self._schemes[policy.endpoint] = scheme
        answer = await self._answer(scheme, policy, repository, refused)
        if answer is None or refused is None or answer.header != refused.header:
            return answer
        return None

    async def _answer(
        self,
        scheme: Bearer | Basic,
        policy: Policy,
        repository: Repository,
        refused: SentAuthorization | None,
    ) -> SentAuthorization | None:
        endpoint = policy.endpoint
        host = endpoint.host or ""
        named = host if endpoint.is_default_port() else f"{host}:{endpoint.port}"
        # What was refused may have been rotated: it is looked up anew, once for all.
        found = await self._logins.get(named, refused.found if refused is not None else None)
        if isinstance(scheme, Basic):
            basic = found.login.basic if found.login is not None else None
            return SentAuthorization(basic, found) if basic is not None else None
        # The challenge's own scope may be a placeholder, or ask for more than we may have.
        scope = "aws" if host == "public.ecr.aws" else f"repository:{repository.path}:pull"
        try:
            return await self._token(scheme, scope, found, policy, refused)
        except (Unauthorized, Denied):
            again = await self._logins.get(named, found)
            if again.identity == found.identity:
                raise
            return await self._token(scheme, scope, again, policy, refused)

    async def _token(
        self,
        challenge: Bearer,
        scope: str,
        found: CredentialLookup,
        policy: Policy,
        refused: SentAuthorization | None,
    ) -> SentAuthorization:
        def good(token: Token) -> bool:
            fresh = token.expires > self._clock()
            return fresh and (refused is None or token.sent.header != refused.header)

        key = (found.identity, challenge.realm, challenge.service or "", scope)
        kept = self._tokens.setdefault(key, SharedValue())
        self._tokens.move_to_end(key)
        if len(self._tokens) > _KEPT:
            self._tokens.popitem(last=False)
        token = await kept.get(good, lambda: self._fetch(challenge, scope, found, policy))
        return token.sent

    async def _fetch(
        self, challenge: Bearer, scope: str, found: CredentialLookup, policy: Policy
    ) -> Token:
        verdict = check_url(challenge.realm, Purpose.REALM, policy.endpoint, policy)
        if not isinstance(verdict, Allowed):
            raise OutboundRefused(f"token realm refused: {verdict.why}")
        begun, ok = self._clock(), False
        try:
            answer = await self._ask(verdict.url, challenge.service, scope, found.login)
            if answer.status != 200:
                raise _refusal(answer)
            value, lifetime = _read(answer.body)
            ok = True
        finally:
            self._emit(TokenFetched(self._upstream, ok, self._clock() - begun))
        # By our own clock from now on: issued_at is of a clock that may be off.
        return Token(
            SentAuthorization(f"Bearer {value}", found), self._clock() + lifetime * (1 - _MARGIN)
        )

    async def _ask(
        self, realm: URL, service: str | None, scope: str, login: Login | None
    ) -> TokenResponse:
        query = {"scope": scope, **({"service": service} if service else {})}
        if login is not None and login.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": login.identity_token, **query}
            return await self._exchange("POST", realm, {}, {"client_id": "oci-mirror", **form})
        basic = login.basic if login is not None else None
        headers = {"Authorization": basic} if basic is not None else {}
        return await self._exchange("GET", realm.update_query(query), headers, None)


def _read(body: bytes) -> tuple[str, float]:
    """``token`` or ``access_token``, and its lifetime; one that is missing or odd is 60 s."""
    try:
        document = json.loads(body)
        value = document.get("token") or document.get("access_token")
        lifetime = document.get("expires_in")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UpstreamUnavailable("the token service answers nonsense") from error
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value:
        raise UpstreamUnavailable("the token service answers without a token")
    if isinstance(lifetime, int | float) and not isinstance(lifetime, bool) and lifetime > 0:
        return value, float(min(lifetime, _LONGEST_LIFETIME))
    return value, DEFAULT_LIFETIME


def _refusal(answer: TokenResponse) -> MirrorError:
    match answer.status:
        case 401:
            return Unauthorized("the token service refuses")
        case 403:
            return Denied("the token service refuses")
        case 400 if _is_invalid_grant(answer.body):
            return Unauthorized("the token service refuses")
        case 429:
            return UpstreamRateLimited(
                "the token service limits the rate", retry_after=answer.pause
            )
        case status:
            return UpstreamUnavailable(f"the token service answers {status}")


def _is_invalid_grant(body: bytes) -> bool:
    """Whether a refresh token is refused (RFC 6749, section 5.2): that is a 400 there."""
    try:
        return bool(json.loads(body).get("error") == "invalid_grant")
    except (ValueError, AttributeError, RecursionError):
        return False
