"""``Authorization`` headers for one upstream: Basic, and bearer tokens of a token service.

Lives here: the response to a challenge (Distribution, ``spec/auth/token.md``; RFC 7617 for Basic),
the cache of tokens. Must not know: how requests are sent, which requests there are.

Many requests need the same token at the same time. One request to the token service serves all of
them: each gets the token or the error. Nobody gets a token of another login, realm, service or
scope.
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

from mirror.config.settings import Upstream
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
from mirror.single_flight import SingleFlight
from mirror.upstream.credentials import CredentialLookup, Login, Logins
from mirror.upstream.outbound import Allowed, Policy, UrlSource, check_url

DEFAULT_TOKEN_TTL_S: Final = 60.0
"""Seconds of a token without ``expires_in``: the default of ``spec/auth/token.md``."""
_MAX_TOKEN_TTL_S: Final = 3600.0
"""Seconds for which a token is used at most, so that revoked access ends within the hour."""
_RENEWAL_MARGIN: Final = 0.1
"""Part of the lifetime by which a token is renewed early, so that it does not expire while a
request is in transit."""
MAX_TOKEN_RESPONSE_BYTES: Final = 64 * 1024
"""Bytes of a token service's response at most. Tokens have a few KiB."""
MAX_CACHED_TOKENS: Final = 10_000
"""Tokens of one upstream in memory: one for each repository, at a few KiB each."""


@dataclass(frozen=True, slots=True)
class TokenResponse:
    """Response of a token service. ``retry_after`` is in seconds, None without this header."""

    status: int
    body: bytes = field(repr=False)
    retry_after: float | None = None


TokenExchange: TypeAlias = Callable[
    [str, URL, Mapping[str, str], Mapping[str, str] | None], Awaitable[TokenResponse]
]
"""(method, url, headers, form) -> response.

It must end in bounded time, and raise an error for more than ``MAX_TOKEN_RESPONSE_BYTES``.
"""


@dataclass(frozen=True, slots=True)
class SentAuthorization:
    """Value of an ``Authorization`` header, and the credential look-up that it was made from."""

    header: str = field(repr=False)
    lookup: CredentialLookup


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token."""

    authorization: SentAuthorization
    renew_at: float
    """Time of the authenticator's ``clock``, in seconds, at which a new token is requested: after
    90 % of the lifetime."""


@dataclass(frozen=True, slots=True)
class _TokenKey:
    """Key of a token in the cache."""

    upstream: str
    identity: str = field(repr=False)
    realm: str
    service: str
    scope: str


class Authenticator:
    """Returns ``Authorization`` headers for one upstream."""

    def __init__(
        self,
        upstream: str,
        settings: Upstream,
        exchange: TokenExchange,
        emit: Observer,
        single_flight: SingleFlight,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an authenticator.

        Args:
            upstream: Name of the upstream.
            settings: Its credentials and time limits.
            exchange: Sends a request to a token service.
            emit: Receives an event for each token.
            single_flight: Runs requests for tokens and look-ups of logins.
            clock: Returns seconds.
        """
        self._upstream = upstream
        limits = settings.limits
        self._logins = Logins(
            settings.credentials, upstream, single_flight, clock, limits.connect + limits.headers
        )
        self._exchange = exchange
        self._emit = emit
        self._single_flight = single_flight
        self._clock = clock
        self._schemes: dict[URL, Bearer | Basic] = {}
        self._tokens: OrderedDict[_TokenKey, Token] = OrderedDict()

    async def authorize_preemptively(
        self, policy: Policy, repository: Repository
    ) -> SentAuthorization | None:
        """Return the authorization for the first attempt, by the latest challenge of the endpoint.

        If this fails, the challenge is forgotten, because the token service may have moved. The
        next request gets a new one.

        Args:
            policy: The endpoint, and the rules for token realms.
            repository: The repository of the request.

        Returns:
            The authorization. None if the endpoint has sent no challenge yet, or if it requires
            Basic and there is no login. For Bearer without a login this is an anonymous token.

        Raises:
            MirrorError: see :meth:`authorize_after_challenge`.
        """
        scheme = self._schemes.get(policy.endpoint)
        if scheme is None:
            return None
        try:
            return await self._authorize(scheme, policy, repository, None)
        except (UpstreamError, asyncio.CancelledError):  # Cancelled: it may have taken too long.
            if self._schemes.get(policy.endpoint) is scheme:
                del self._schemes[policy.endpoint]
            raise

    async def authorize_after_challenge(
        self,
        headers: Sequence[str],
        policy: Policy,
        repository: Repository,
        refused: SentAuthorization | None,
    ) -> SentAuthorization | None:
        """Return the authorization for a repeated request, after a 401.

        Args:
            headers: Values of ``WWW-Authenticate``.
            policy: The endpoint, and the rules for token realms.
            repository: The repository of the request.
            refused: The authorization that the request was sent with.

        Returns:
            The authorization. None if no challenge has a known scheme, if the scheme is Basic and
            there is no login, or if the result is the header that was refused. For Bearer without a
            login this is an anonymous token.

        Raises:
            Unauthorized, Denied: the token service refused.
            OutboundRefused: the guard refused the realm.
            UpstreamRateLimited: the token service responded with 429.
            UpstreamUnavailable: the token service, or the source of credentials, failed.
            Draining: the process shuts down.
        """
        challenges = parse_challenges(headers)
        bearer = next((c for c in challenges if isinstance(c, Bearer)), None)
        scheme = bearer or next((c for c in challenges if isinstance(c, Basic)), None)
        if scheme is None:
            return None
        self._schemes[policy.endpoint] = scheme
        authorization = await self._authorize(scheme, policy, repository, refused)
        if authorization is None or refused is None or authorization.header != refused.header:
            return authorization
        return None

    async def _authorize(
        self,
        scheme: Bearer | Basic,
        policy: Policy,
        repository: Repository,
        refused: SentAuthorization | None,
    ) -> SentAuthorization | None:
        endpoint = policy.endpoint
        host = endpoint.host or ""
        host_port = host if endpoint.is_default_port() else f"{host}:{endpoint.port}"
        # A refused secret may have been rotated, so it is looked up again.
        lookup = await self._logins.get(host_port, refused.lookup if refused is not None else None)
        if isinstance(scheme, Basic):
            basic = lookup.login.basic if lookup.login is not None else None
            return SentAuthorization(basic, lookup) if basic is not None else None
        # The scope of the challenge may be a placeholder, or more than we may have.
        scope = "aws" if host == "public.ecr.aws" else f"repository:{repository.path}:pull"
        try:
            return await self._get_token(scheme, scope, lookup, policy, refused)
        except (Unauthorized, Denied):
            new_lookup = await self._logins.get(host_port, lookup)
            if new_lookup.identity == lookup.identity:
                raise
            return await self._get_token(scheme, scope, new_lookup, policy, refused)

    async def _get_token(
        self,
        challenge: Bearer,
        scope: str,
        lookup: CredentialLookup,
        policy: Policy,
        refused: SentAuthorization | None,
    ) -> SentAuthorization:
        """Return the cached token, or join the request for a new one."""
        key = _TokenKey(
            self._upstream, lookup.identity, challenge.realm, challenge.service or "", scope
        )
        token = self._tokens.get(key)
        if (
            token is None
            or token.renew_at <= self._clock()
            or (refused is not None and token.authorization.header == refused.header)
        ):
            token = await self._single_flight.share(
                ("token", key), lambda: self._request_token(key, challenge, lookup, policy)
            )
        else:
            self._tokens.move_to_end(key)
        return token.authorization

    async def _request_token(
        self, key: _TokenKey, challenge: Bearer, lookup: CredentialLookup, policy: Policy
    ) -> Token:
        """Request a token, and replace the cached one. After a failure, none is cached."""
        verdict = check_url(challenge.realm, UrlSource.REALM, policy.endpoint, policy)
        if not isinstance(verdict, Allowed):
            raise OutboundRefused(f"token realm refused: {verdict.why}")
        started_at, token = self._clock(), None
        try:
            response = await self._send_token_request(
                verdict.url, challenge.service, key.scope, lookup.login
            )
            if response.status != 200:
                raise _token_error(response)
            value, lifetime = _parse_token(response.body)
            # issued_at is ignored: the clock of the token service may be wrong.
            renew_at = self._clock() + lifetime * (1 - _RENEWAL_MARGIN)
            token = Token(SentAuthorization(f"Bearer {value}", lookup), renew_at)
        finally:
            self._tokens.pop(key, None)
            self._emit(TokenFetched(self._upstream, token is not None, self._clock() - started_at))
        self._tokens[key] = token
        if len(self._tokens) > MAX_CACHED_TOKENS:
            self._tokens.popitem(last=False)
        return token

    async def _send_token_request(
        self, realm: URL, service: str | None, scope: str, login: Login | None
    ) -> TokenResponse:
        """Send ``GET`` with Basic, or ``POST`` for an identity token (``spec/auth/oauth.md``)."""
        query = {"scope": scope, **({"service": service} if service else {})}
        if login is not None and login.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": login.identity_token, **query}
            return await self._exchange("POST", realm, {}, {"client_id": "oci-mirror", **form})
        basic = login.basic if login is not None else None
        headers = {"Authorization": basic} if basic is not None else {}
        return await self._exchange("GET", realm.update_query(query), headers, None)


def _parse_token(body: bytes) -> tuple[str, float]:
    """Return ``token`` or ``access_token``, and its lifetime in seconds.

    A lifetime that is missing or malformed is ``DEFAULT_TOKEN_TTL_S``.
    """
    try:
        document = json.loads(body)
        value = document.get("token") or document.get("access_token")
        lifetime = document.get("expires_in")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UpstreamUnavailable("the token service returned a malformed response") from error
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not value:
        raise UpstreamUnavailable("the token service returned no token")
    if isinstance(lifetime, int | float) and not isinstance(lifetime, bool) and lifetime > 0:
        return value, float(min(lifetime, _MAX_TOKEN_TTL_S))
    return value, DEFAULT_TOKEN_TTL_S


def _token_error(response: TokenResponse) -> MirrorError:
    """Translate the status of a token service's response into an error."""
    match response.status:
        case 401:
            return Unauthorized("the token service refused the credentials")
        case 403:
            return Denied("the token service denied access")
        case 400 if _is_invalid_grant(response.body):
            return Unauthorized("the token service refused the identity token")
        case 429:
            return UpstreamRateLimited(
                "the token service limits the rate", retry_after=response.retry_after
            )
        case status:
            return UpstreamUnavailable(f"the token service responded with {status}")


def _is_invalid_grant(body: bytes) -> bool:
    """Return whether a 400 means that the refresh token was refused (RFC 6749, section 5.2)."""
    try:
        return bool(json.loads(body).get("error") == "invalid_grant")
    except (ValueError, AttributeError, RecursionError):
        return False
