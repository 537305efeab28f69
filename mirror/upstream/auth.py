"""``Authorization`` headers for one upstream: Basic, and bearer tokens of a token service.

Lives here: the responses to challenges (Distribution, ``spec/auth/token.md``; RFC 7617 for Basic),
the cache of tokens, and the scheme that each repository accepted last. Must not know: how requests
are sent, which requests there are.

Theory of operation. A request has a :class:`Negotiation`. It sends what the repository accepted
last. If the endpoint or the token service refuses that, the endpoint is asked without
``Authorization``, and its own answer counts. Then each scheme of its challenges is tried, until one
is accepted. A refusal says nothing about other repositories, so nothing is remembered for them.

Many requests need the same token at the same time. One request to the token service serves all of
them: each gets the token or the error. Nobody gets a token of another endpoint, login, realm,
service or scope.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from cachetools import LRUCache
from yarl import URL

from mirror.config.settings import Upstream
from mirror.observability.events import (
    LogMessage,
    Observer,
    TokenFetched,
    TokenResult,
    current_stage,
)
from mirror.oci.challenge import Basic, Bearer, parse_challenges, pull_scope
from mirror.oci.errors import (
    Denied,
    Draining,
    MirrorError,
    OutboundRefused,
    Unauthorized,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.upstream.credentials import CredentialLookup, Login, Logins, host_of
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
MAX_CACHED_TOKEN_BYTES: Final = 16 * 1024 * 1024
"""Bytes of all tokens of one upstream in memory: about 5,000 repositories. The token that was not
used for the longest time is dropped first, and requested again when it is needed."""
MAX_REMEMBERED_BYTES: Final = 8 * 1024 * 1024
"""Bytes of all remembered schemes of one upstream: about 10,000 repositories. A repository whose
scheme was dropped meets one more 401."""
_ENTRY_BYTES: Final = 640
"""Bytes of a cache entry beside its text: objects, and the place in the dictionary."""
_MAX_TRIES: Final = 6
"""Tries to get an authorization after a challenge, for one request. Two are for our own scope (a
cached token, then a new one), one for the scope of the challenge, the rest for other challenges."""


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
class Scheme:
    """One way to authorize: Basic, or a bearer token of one realm, service and scope."""

    realm: str = ""
    """URL of the token service, untrusted, as the challenge names it. Empty: Basic."""
    service: str = ""
    scope: str = ""


@dataclass(frozen=True, slots=True)
class SentAuthorization:
    """Value of an ``Authorization`` header, and what it was made from."""

    header: str = field(repr=False)
    scheme: Scheme
    lookup: CredentialLookup
    is_from_cache: bool = False
    """Whether it was made for an earlier request, so that it may have been revoked since."""


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

    endpoint: URL
    identity: str = field(repr=False)
    scheme: Scheme


class _LoginRefused(Unauthorized):
    """The token service refused a login. The same login must not be sent to it again at once."""


class Authenticator:
    """Makes ``Authorization`` headers for one upstream."""

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
            settings: Its endpoints, credentials and time limits.
            exchange: Sends a request to a token service.
            emit: Receives an event for each token.
            single_flight: Runs requests for tokens and look-ups of logins.
            clock: Returns seconds.
        """
        self._upstream = upstream
        self.logins = Logins(settings, upstream, single_flight, clock)
        self._exchange = exchange
        self._emit = emit
        self._single_flight = single_flight
        self._clock = clock
        self._remembered: LRUCache[tuple[URL, str], Scheme] = LRUCache(
            MAX_REMEMBERED_BYTES, getsizeof=_scheme_size
        )
        self._tokens: LRUCache[_TokenKey, Token] = LRUCache(
            MAX_CACHED_TOKEN_BYTES, getsizeof=_token_size
        )

    def remembered(self, policy: Policy, repository: Repository) -> Scheme | None:
        """Return the scheme that the repository accepted last. None: it is not known."""
        return self._remembered.get((policy.endpoint, repository.path))

    def accept(self, policy: Policy, repository: Repository, sent: SentAuthorization) -> None:
        """Remember the scheme that the endpoint has accepted for this repository."""
        self._remembered[policy.endpoint, repository.path] = sent.scheme

    def forget(self, policy: Policy, repository: Repository) -> None:
        """Forget the scheme of this repository. Its next request is sent without one."""
        self._remembered.pop((policy.endpoint, repository.path), None)

    def reject(self, policy: Policy, sent: SentAuthorization) -> None:
        """Drop a token or a login that the endpoint has refused, unless it was replaced already."""
        if not sent.scheme.realm:
            self.logins.reject(host_of(policy.endpoint), sent.lookup)
        key = _TokenKey(policy.endpoint, sent.lookup.identity, sent.scheme)
        token = self._tokens.get(key)
        if token is not None and token.authorization.header == sent.header:
            del self._tokens[key]

    async def obtain(
        self, scheme: Scheme, policy: Policy, repository: Repository
    ) -> SentAuthorization | None:
        """Return the authorization of a scheme.

        Args:
            scheme: The scheme.
            policy: The endpoint, and the rules for token realms.
            repository: The repository of the request.

        Returns:
            The authorization. None if the scheme is Basic and there is no login. For a token
            without a login this is an anonymous token.

        Raises:
            Unauthorized, Denied: the token service refused.
            OutboundRefused: the guard refused the realm.
            UpstreamRateLimited: the token service responded with 429.
            UpstreamUnavailable: the token service, or the source of credentials, failed.
            Draining: the process shuts down.
        """
        host, name = host_of(policy.endpoint), policy.path_of(repository)
        lookup = await self.logins.get(host, name)
        if not scheme.realm:
            basic = lookup.login.basic if lookup.login is not None else None
            if basic is None:
                return None
            return SentAuthorization(basic, scheme, lookup, is_from_cache=True)
        try:
            return await self._get_token(scheme, lookup, policy)
        except (Unauthorized, Denied):
            self.logins.reject(host, lookup)
            new_lookup = await self.logins.get(host, name)
            if new_lookup.identity == lookup.identity:
                raise
            return await self._get_token(scheme, new_lookup, policy)

    async def _get_token(
        self, scheme: Scheme, lookup: CredentialLookup, policy: Policy
    ) -> SentAuthorization:
        """Return the cached token, or join the request for a new one."""
        key = _TokenKey(policy.endpoint, lookup.identity, scheme)
        token = self._tokens.get(key)
        if token is not None and token.renew_at > self._clock():
            return replace(token.authorization, is_from_cache=True)
        with current_stage("token"):
            token = await self._single_flight.share(
                ("token", self._upstream, key), lambda: self._request_token(key, lookup, policy)
            )
        return token.authorization

    async def _request_token(
        self, key: _TokenKey, lookup: CredentialLookup, policy: Policy
    ) -> Token:
        """Request a token, and replace the cached one. After a failure, none is cached."""
        verdict = check_url(key.scheme.realm, UrlSource.REALM, policy.endpoint, policy)
        if not isinstance(verdict, Allowed):
            raise OutboundRefused(f"token realm refused: {verdict.why}")
        started_at = self._clock()
        result: TokenResult = "error"
        try:
            response = await self._send_token_request(verdict.url, key.scheme, lookup.login)
            if response.status != 200:
                raise self._token_error(response, verdict.url, lookup, policy)
            value, lifetime = _parse_token(response.body)
            # issued_at is ignored: the clock of the token service may be wrong.
            renew_at = self._clock() + lifetime * (1 - _RENEWAL_MARGIN)
            token = Token(SentAuthorization(f"Bearer {value}", key.scheme, lookup), renew_at)
            result = "ok"
        except _LoginRefused:
            raise
        except (Unauthorized, Denied):
            result = "refused"
            raise
        finally:
            self._tokens.pop(key, None)
            self._emit(TokenFetched(self._upstream, result, self._clock() - started_at))
        self._tokens[key] = token
        return token

    async def _send_token_request(
        self, realm: URL, scheme: Scheme, login: Login | None
    ) -> TokenResponse:
        """Send ``GET`` with Basic, or ``POST`` for an identity token (``spec/auth/oauth.md``)."""
        service = {"service": scheme.service} if scheme.service else {}
        if login is not None and login.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": login.identity_token}
            form |= {"client_id": "oci-mirror", "scope": scheme.scope, **service}
            return await self._exchange("POST", realm, {}, form)
        basic = login.basic if login is not None else None
        headers = {"Authorization": basic} if basic is not None else {}
        # Several scopes are several parameters (``spec/auth/token.md``).
        query = [*service.items(), *(("scope", scope) for scope in scheme.scope.split())]
        return await self._exchange("GET", realm.update_query(query), headers, None)

    def _token_error(
        self, response: TokenResponse, realm: URL, lookup: CredentialLookup, policy: Policy
    ) -> MirrorError:
        """Translate the status of a token service's response into an error."""
        service = f"the token service {realm.host}"
        match response.status:
            case 401 | 400 if response.status == 401 or _is_invalid_grant(response.body):
                if lookup.login is not None:
                    return self.login_refused(service)
                missing = self.logins.describe_missing(host_of(policy.endpoint))
                return Unauthorized(f"{service} requires credentials: {missing}")
            case 403:
                return Denied(f"{service} denied access")
            case 429:
                return UpstreamRateLimited(
                    f"{service} limits the rate", retry_after=response.retry_after
                )
            case status:
                return UpstreamUnavailable(f"{service} responded with {status}")

    def login_refused(self, host: str) -> Unauthorized:
        """Return the error of a login that ``host`` refused, and write it to the log.

        Clients get a 403 for it, which is logged like one for a wrong name of an image.
        """
        error = _LoginRefused(f"{host} refused the login of {self.logins.key}")
        self._emit(LogMessage("warning", "a login was refused", (("why", error.message),)))
        return error


class Negotiation:
    """The authorizations of one request to one endpoint, one after the other.

    Send the request with ``first``. After each 401 or 403, send it with ``next``, until that
    returns None. After any other response, call ``accept``.
    """

    def __init__(
        self, authenticator: Authenticator, policy: Policy, repository: Repository
    ) -> None:
        """Begin a negotiation.

        Args:
            authenticator: Makes the authorizations, and remembers what was accepted.
            policy: The endpoint, and the rules for token realms.
            repository: The repository of the request.
        """
        self._auth = authenticator
        self._policy = policy
        self._repository = repository
        self._sent: SentAuthorization | None = None
        self._known: set[Scheme] = set()
        """Schemes of the challenges so far."""
        self._untried: deque[Scheme] = deque()
        self._tries = 0
        self._refused: list[SentAuthorization] = []
        self._failures: list[MirrorError] = []

    async def first(self) -> str:
        """Return the header to send first: that of the scheme that was accepted last.

        If it cannot be had, the scheme is forgotten. The next request is sent without one, because
        the token service may have moved.

        Returns:
            The value of ``Authorization``. Empty: send the request without it. This is also the
            result if the token service refuses: the repository may need no token any more.

        Raises:
            UpstreamError, Draining: see :meth:`Authenticator.obtain`.
        """
        scheme = self._auth.remembered(self._policy, self._repository)
        if scheme is None:
            return ""
        try:
            self._sent = await self._auth.obtain(scheme, self._policy, self._repository)
        except (Unauthorized, Denied, OutboundRefused):
            self._auth.forget(self._policy, self._repository)
        except (UpstreamError, asyncio.CancelledError):  # Cancelled: it may have taken too long.
            self._auth.forget(self._policy, self._repository)
            raise
        return self._sent.header if self._sent is not None else ""

    async def next(self, status: int, challenges: Sequence[str]) -> str | None:
        """Return the header to send after a refusal.

        Args:
            status: 401 or 403.
            challenges: Values of ``WWW-Authenticate``.

        Returns:
            The value of ``Authorization``. Empty: send the request without it. None: nothing is
            left to send.

        Raises:
            MirrorError: see :meth:`Authenticator.obtain`. The status is 401, and at least one
                authorization could not be had.
        """
        refused, self._sent = self._sent, None
        if refused is not None:
            self._auth.reject(self._policy, refused)
            self._refused.append(refused)
            if not self._known:
                # It was sent in advance. The challenge of a dead token may name another realm than
                # that of a request without a token.
                self._auth.forget(self._policy, self._repository)
                return ""
        self._add(challenges)
        if refused is not None and refused.is_from_cache:
            self._untried.append(refused.scheme)
        while self._untried and self._tries < _MAX_TRIES:
            self._sent = await self._try(self._untried.popleft())
            if self._sent is not None:
                return self._sent.header
        if self._failures and status == 401:
            # A 401 is final only if every token service could be asked.
            failed = (error for error in self._failures if isinstance(error, UpstreamError))
            raise next(failed, self._failures[0])
        return None

    def accept(self) -> None:
        """Remember the scheme of the last header for the repository's next request."""
        if self._sent is not None:
            self._auth.accept(self._policy, self._repository, self._sent)

    def refusal(self) -> Unauthorized:
        """Return the error of a request that got 401, with each authorization that there is."""
        host, logins = host_of(self._policy.endpoint), self._auth.logins
        with_login = [sent for sent in self._refused if sent.lookup.login is not None]
        if any(sent.scheme == Scheme() for sent in with_login):
            return self._auth.login_refused(host)
        if with_login:  # A token service has accepted it. The repository may not exist.
            return Unauthorized(f"{host} refused the login of {logins.key}")
        return Unauthorized(
            f"{host} requires credentials for this repository, or does not have it: "
            f"{logins.describe_missing(host)}"
        )

    def _add(self, challenges: Sequence[str]) -> None:
        """Add the schemes that are not known yet. Tokens go before Basic, our own scope first.

        The scope of a challenge may be a placeholder. It may also be the right one: a front may
        rewrite ``/v2/X`` to ``/v2/hub/X``.
        """
        parsed = parse_challenges(challenges)
        bearers = [challenge for challenge in parsed if isinstance(challenge, Bearer)]
        is_ecr = self._policy.endpoint.host == "public.ecr.aws"
        own_scope = "aws" if is_ecr else f"repository:{self._policy.path_of(self._repository)}:pull"
        schemes = [
            Scheme(realm=bearer.realm, service=bearer.service or "", scope=scope)
            for bearer in bearers
            for scope in (own_scope, pull_scope(bearer.scope or ""))
            if scope
        ]
        if any(isinstance(challenge, Basic) for challenge in parsed):
            schemes.append(Scheme())
        self._untried += dict.fromkeys(scheme for scheme in schemes if scheme not in self._known)
        self._known |= set(schemes)

    async def _try(self, scheme: Scheme) -> SentAuthorization | None:
        """Return an authorization that was not refused yet. None: there is none."""
        self._tries += 1
        try:
            sent = await self._auth.obtain(scheme, self._policy, self._repository)
        except Draining:
            raise
        except MirrorError as error:
            self._failures.append(error)
            if isinstance(error, _LoginRefused | UpstreamError):
                # For another scope the same request would fail in the same way.
                others = (other for other in self._untried if other.realm != scheme.realm)
                self._untried = deque(others)
            return None
        if sent is None or any(sent.header == refused.header for refused in self._refused):
            return None
        return sent


def _scheme_size(scheme: Scheme) -> int:
    return _ENTRY_BYTES + len(scheme.realm) + len(scheme.service) + len(scheme.scope)


def _token_size(token: Token) -> int:
    sent = token.authorization
    return _ENTRY_BYTES + len(sent.header) + _scheme_size(sent.scheme)


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


def _is_invalid_grant(body: bytes) -> bool:
    """Return whether a 400 means that the refresh token was refused (RFC 6749, section 5.2)."""
    try:
        return bool(json.loads(body).get("error") == "invalid_grant")
    except (ValueError, AttributeError, RecursionError):
        return False
