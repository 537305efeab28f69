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

from mirror.config import Credentials
from mirror.events import Observer, TokenFetched
from mirror.oci.challenge import Basic, Bearer, parse_challenges
from mirror.oci.errors import (
    Denied,
    MirrorError,
    OutboundRefused,
    Unauthorized,
    UpstreamUnavailable,
)
from mirror.oci.reference import Repository
from mirror.upstream.credentials import Login, look_up
from mirror.upstream.outbound import Allowed, Policy, Purpose, judge

DEFAULT_LIFETIME: Final = 60.0
_LONGEST_LIFETIME: Final = 3600.0
_MARGIN: Final = 0.1
"""Part of a lifetime at whose begin a token is asked for anew, before it ends in mid-transfer."""
TOKEN_LIMIT: Final = 64 * 1024
_KEPT: Final = 10_000

Exchange: TypeAlias = Callable[
    [str, URL, Mapping[str, str], Mapping[str, str] | None], Awaitable[tuple[int, bytes]]
]
"""(method, url, headers, form) to (status, body of at most ``TOKEN_LIMIT`` bytes and one)."""


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token, good until ``expires`` (monotonic seconds)."""

    value: str = field(repr=False)
    expires: float


@dataclass(slots=True)
class _Slot:
    """What is known of one token: the latest outcome, and who is asking."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    token: Token | None = None
    error: MirrorError | None = None
    at: float = -1.0
    """When the latest outcome came."""


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
        self._credentials = credentials
        self._exchange = exchange
        self._emit = emit
        self._clock = clock
        self._schemes: dict[URL, Bearer | Basic] = {}
        self._slots: OrderedDict[tuple[str, str, str, str], _Slot] = OrderedDict()

    async def authorization(self, policy: Policy, repository: Repository) -> str | None:
        """The header to begin with: what the endpoint wanted the last time, if anything."""
        scheme = self._schemes.get(policy.endpoint)
        return None if scheme is None else await self._answer(scheme, policy, repository, None)

    async def challenged(
        self,
        headers: Sequence[str],
        policy: Policy,
        repository: Repository,
        refused: str | None,
    ) -> str | None:
        """The header that answers a 401 (``WWW-Authenticate``); ``refused`` was no good.

        None: there is nothing to answer it with. Raises ``Unauthorized`` or ``Denied`` where the
        token service says no, ``OutboundRefused`` for a realm that is not to be asked, and
        ``UpstreamUnavailable`` where it cannot be asked.
        """
        challenges = parse_challenges(headers)
        bearer = next((c for c in challenges if isinstance(c, Bearer)), None)
        scheme = bearer or next((c for c in challenges if isinstance(c, Basic)), None)
        if scheme is None:
            return None
        self._schemes[policy.endpoint] = scheme
        answer = await self._answer(scheme, policy, repository, refused)
        return None if answer == refused else answer

    async def _answer(
        self, scheme: Bearer | Basic, policy: Policy, repository: Repository, refused: str | None
    ) -> str | None:
        endpoint = policy.endpoint
        host = endpoint.host or ""
        named = host if endpoint.is_default_port() else f"{host}:{endpoint.port}"
        login = await look_up(self._credentials, self._upstream, named)
        if isinstance(scheme, Basic):
            return login.basic if login is not None else None
        # The challenge's own scope may be a placeholder, or ask for more than we may have.
        scope = "aws" if host == "public.ecr.aws" else f"repository:{repository.path}:pull"
        token = await self._token(scheme, scope, login, policy, refused)
        return f"Bearer {token.value}"

    async def _token(
        self,
        challenge: Bearer,
        scope: str,
        login: Login | None,
        policy: Policy,
        refused: str | None,
    ) -> Token:
        identity = login.identity if login is not None else ""
        slot = self._slot((identity, challenge.realm, challenge.service or "", scope))
        asked = self._clock()
        if (good := self._good(slot, refused)) is not None:
            return good
        async with slot.lock:
            # While we waited for the lock another one may have asked for us, well or badly.
            if slot.at >= asked and slot.error is not None:
                raise slot.error
            if (good := self._good(slot, refused)) is not None:
                return good
            try:
                slot.token, slot.error = await self._fetch(challenge, scope, login, policy), None
            except MirrorError as error:
                slot.token, slot.error = None, error
                raise
            finally:
                slot.at = self._clock()
            return slot.token

    def _good(self, slot: _Slot, refused: str | None) -> Token | None:
        token = slot.token
        if token is None or token.expires <= self._clock():
            return None
        return None if refused == f"Bearer {token.value}" else token

    def _slot(self, key: tuple[str, str, str, str]) -> _Slot:
        slot = self._slots.setdefault(key, _Slot())
        self._slots.move_to_end(key)
        if len(self._slots) > _KEPT:
            self._slots.popitem(last=False)
        return slot

    async def _fetch(
        self, challenge: Bearer, scope: str, login: Login | None, policy: Policy
    ) -> Token:
        verdict = judge(challenge.realm, Purpose.REALM, policy.endpoint, policy)
        if not isinstance(verdict, Allowed):
            raise OutboundRefused(f"token realm refused: {verdict.why}")
        begun, status = self._clock(), 0
        try:
            status, body = await self._ask(verdict.url, challenge.service, scope, login)
            if status != 200:
                raise _refusal(status)
            return self._read(body)
        finally:
            self._emit(TokenFetched(self._upstream, status == 200, self._clock() - begun))

    async def _ask(
        self, realm: URL, service: str | None, scope: str, login: Login | None
    ) -> tuple[int, bytes]:
        query = {"scope": scope, **({"service": service} if service else {})}
        if login is not None and login.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": login.identity_token, **query}
            return await self._exchange("POST", realm, {}, {"client_id": "oci-mirror", **form})
        headers = {"Authorization": login.basic} if login is not None else {}
        return await self._exchange("GET", realm.update_query(query), headers, None)

    def _read(self, body: bytes) -> Token:
        """``token`` or ``access_token``; a lifetime that is missing or odd is 60 s."""
        if len(body) > TOKEN_LIMIT:
            raise UpstreamUnavailable("the token service answers too much")
        try:
            document = json.loads(body)
            value = document.get("token") or document.get("access_token")
            lifetime = document.get("expires_in")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UpstreamUnavailable("the token service answers nonsense") from error
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise UpstreamUnavailable("the token service answers without a token")
        seconds = DEFAULT_LIFETIME
        if isinstance(lifetime, int | float) and not isinstance(lifetime, bool) and lifetime > 0:
            seconds = min(float(lifetime), _LONGEST_LIFETIME)
        # By our own clock from now on: issued_at is of a clock that may be off.
        return Token(value, self._clock() + seconds * (1 - _MARGIN))


def _refusal(status: int) -> MirrorError:
    match status:
        case 401:
            return Unauthorized("the token service refuses")
        case 403:
            return Denied("the token service refuses")
        case _:
            return UpstreamUnavailable(f"the token service answers {status}")
