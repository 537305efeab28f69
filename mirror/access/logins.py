"""Turn an ``Authorization`` header field into an identity.

Lives here: the forms of credentials, the order in which they are tried, and what is remembered.
Must not know: rules, responses.

A password takes 60 ms and more to check, by design. So results are remembered for a minute, under a
keyed hash: neither passwords nor their hashes stay in memory. What is remembered ends at once when
a file changes. Checks run in two threads, in the order in which they came; a name that has failed
too often at its address by then gets none.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
import secrets
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from cachetools import LRUCache

from mirror.access.access_tokens import bearer_token, find_token
from mirror.access.failure_limit import FailureLimit, counted_address
from mirror.access.identity import ANONYMOUS, Identity
from mirror.access.issuers import KeysUnavailable, TokenRefused, is_jwt
from mirror.access.login_credentials import LoginCredentials
from mirror.oci.errors import TooManyRequests

RESULT_TTL_S: Final = 60.0
"""Seconds for which the result of a check is remembered."""
_MAX_RESULTS: Final = 10_000
"""Results that are remembered: 3 MB for the right ones, and as much for the wrong ones."""
_THREADS: Final = 2
"""Checks of passwords at the same time: each takes a processor."""
_MAX_WAITING: Final = 256
"""Checks that wait for a thread: with a cost of 10, the last one waits for eight seconds."""
_MAX_CLIENT_WAITING: Final = 64
"""The same of one address, so that its guesses do not take the place of all others."""
_EMPTY: Final = re.compile(r"basic +Og== *", re.IGNORECASE)
"""``Authorization`` of a client that was asked for credentials, and has none (skopeo): ``:``."""
_BASIC: Final = re.compile(r"basic +([A-Za-z0-9+/_-]+={0,2}) *", re.IGNORECASE | re.ASCII)


class LoginFailed(Exception):
    """The credentials are wrong.

    The text is shown to the client, so it says nothing of which part was wrong.
    """


@dataclass(frozen=True, slots=True)
class _LoginResult:
    identity: Identity | None
    """None: the credentials are wrong."""
    ends_at: float
    is_token: bool = False
    """Whether it is of a token that is right, which nobody can guess."""


@dataclass(frozen=True, slots=True)
class _LoginAttempt:
    """Credentials that a client has sent."""

    key: bytes
    """Keyed hash of the header field."""
    user: str | None
    """None: a bearer token."""
    secret: str
    client: str
    """Address of the client."""
    failures: FailureLimit
    """Where it counts if it fails."""


class ClientLogins:
    """Checks the credentials of clients, for one process."""

    def __init__(self, now: Callable[[], float], report: Callable[[str], None]) -> None:
        """Start without credentials.

        Args:
            now: Returns the seconds since the epoch.
            report: Receives the reason if a token is refused, in one line. Anybody can cause that.
        """
        self._report = report
        self._credentials: LoginCredentials | None = None
        self._now = now
        self._key = secrets.token_bytes(32)
        self._results: LRUCache[bytes, _LoginResult] = LRUCache(_MAX_RESULTS)
        self._wrong: LRUCache[bytes, _LoginResult] = LRUCache(_MAX_RESULTS)
        """Wrong credentials. Anybody can send many, so they take no place of those that are right.
        """
        self._failures = FailureLimit()
        self._unneeded_failures = FailureLimit()
        """Failures of requests that needed no login. Clients also send credentials of upstreams,
        which must not lock out the users behind the same address."""
        self._turn = asyncio.Semaphore(_THREADS)
        self._waiting: Counter[str] = Counter()
        """Checks that wait, of each address that has some."""
        self._running: dict[bytes, asyncio.Event] = {}
        """Credentials that are being checked. Set once the check has ended."""
        self._generation = 0
        self._threads = ThreadPoolExecutor(_THREADS, "password")

    def use(self, credentials: LoginCredentials | None) -> None:
        """Use these credentials from now on, and forget all results. None: nobody can log in."""
        self._credentials = credentials
        self._generation += 1
        self._results.clear()
        self._wrong.clear()

    def refresh(self) -> None:
        """Read the files that have changed. Blocks for them; they are small.

        Results are forgotten unless it is certain that nothing has changed.
        """
        if self._credentials is None:
            return
        has_changed = True
        try:
            has_changed = self._credentials.refresh()
        finally:
            if has_changed:
                self.use(self._credentials)

    def close(self) -> None:
        """End the threads, without waiting for them. No request must log in any more."""
        self._threads.shutdown(wait=False)

    async def identify(
        self, authorization: str, client: str, *, is_needed: bool = True
    ) -> Identity:
        """Return the client that sends an ``Authorization`` header field.

        Args:
            authorization: The field, as sent.
            client: Address of the client.
            is_needed: False: everybody may do what the client requests. Its failures are counted
                for such requests only.

        Raises:
            LoginFailed: The credentials are wrong, malformed, or of another kind.
            TooManyRequests: The address has failed too often with the name of the user, or with
                many names, or too many clients log in.
        """
        if _EMPTY.fullmatch(authorization):
            return ANONYMOUS
        user, secret = _parse(authorization)
        key = hmac.digest(self._key, authorization.encode(errors="replace"), "sha256")
        failures = self._failures if is_needed else self._unneeded_failures
        result = await self._share(_LoginAttempt(key, user, secret, client, failures))
        if result.identity is None:
            raise LoginFailed("the user name or the password is wrong")
        return result.identity

    def _find(self, attempt: _LoginAttempt) -> _LoginResult | None:
        """Return the result that is remembered, or None.

        Raises ``TooManyRequests``, also for the right password: otherwise, a guess that is the
        password of a user who has just logged in would be accepted, however many came before it.
        """
        result = self._results.get(attempt.key) or self._wrong.get(attempt.key)
        if result is None or self._now() >= result.ends_at:
            return None
        if not result.is_token:
            self._refuse_if_limited(attempt)
        return result

    def _refuse_if_limited(self, attempt: _LoginAttempt) -> None:
        user = attempt.user or ""
        wait = attempt.failures.seconds_to_wait(attempt.client, user, self._now())
        if wait > 0:
            raise TooManyRequests(
                "too many failed logins from this address: try again later", retry_after=wait
            )

    async def _share(self, attempt: _LoginAttempt) -> _LoginResult:
        """Check credentials. Requests with the same ones share the result."""
        while (result := self._find(attempt)) is None:
            running = self._running.get(attempt.key)
            if running is not None:
                await running.wait()
                continue
            running = self._running[attempt.key] = asyncio.Event()
            try:
                return await self._check(attempt)
            finally:
                del self._running[attempt.key]
                running.set()
        return result

    async def _check(self, attempt: _LoginAttempt) -> _LoginResult:
        # Together: a reload may have replaced the credentials while the request waited.
        credentials, generation = self._credentials, self._generation
        if credentials is None:
            raise LoginFailed("nobody can log in here: leave out the credentials")
        user = attempt.user
        result = await self._check_token(credentials, attempt.secret)
        if result is None and user is not None and credentials.passwords is not None:
            # Not before: a token that is right was not guessed, and costs microseconds.
            self._refuse_if_limited(attempt)
            check = partial(credentials.passwords.is_right, user, attempt.secret)
            is_right = await self._is_password_right(check, attempt)
            result = _LoginResult(Identity(user) if is_right else None, self._now() + RESULT_TTL_S)
            if is_right:
                attempt.failures.record_login(attempt.client, user)
        if result is None:
            result = _LoginResult(identity=None, ends_at=self._now() + RESULT_TTL_S)
        if result.identity is None:
            # Wrong ones that are repeated are remembered, and count once: they are no new guess.
            self._refuse_if_limited(attempt)
            attempt.failures.record_failure(attempt.client, user or "", self._now())
        if generation == self._generation:
            results = self._wrong if result.identity is None else self._results
            results[attempt.key] = result
        return result

    async def _check_token(self, credentials: LoginCredentials, secret: str) -> _LoginResult | None:
        """Check a token or a JWT. Returns None for anything else."""
        now = self._now()
        wrong = _LoginResult(identity=None, ends_at=now + RESULT_TTL_S)
        token = find_token(credentials.tokens, secret)
        if token is not None:
            ends_at = float("inf") if token.expires_at is None else token.expires_at
            if now >= ends_at:
                return wrong
            ends_at = min(now + RESULT_TTL_S, ends_at)
            return _LoginResult(token.identity, ends_at, is_token=True)
        if not (credentials.issuers and is_jwt(secret)):
            return None
        try:
            valid = await credentials.check_jwt(secret)
        except KeysUnavailable as error:
            self._report(f"access.issuers: {error}")
            # The token may be right, so this is no failure of the client.
            raise LoginFailed(f"{error}: try again later") from None
        except TokenRefused as error:
            self._report(f"access.issuers: {error}")
            return replace(wrong, ends_at=now)  # Not remembered: its key may be fetched meanwhile.
        ends_at = min(now + RESULT_TTL_S, valid.expires_at)
        return _LoginResult(valid.identity, ends_at, is_token=True)

    async def _is_password_right(self, check: Callable[[], bool], attempt: _LoginAttempt) -> bool:
        """Return the result of ``check``, called in a thread when it is its turn."""
        network = counted_address(attempt.client)
        if self._waiting[network] >= _MAX_CLIENT_WAITING or self._waiting.total() >= _MAX_WAITING:
            raise TooManyRequests("too many clients log in at the same time: try again")
        self._waiting[network] += 1
        try:
            async with self._turn:
                self._refuse_if_limited(attempt)  # Others may have failed meanwhile.
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._threads, check)
        finally:
            self._waiting[network] -= 1
            self._waiting += Counter()  # Drops those at zero.


def _parse(authorization: str) -> tuple[str | None, str]:
    """Return the user, and the password or token. Raises ``LoginFailed``.

    The user is None for a bearer token.
    """
    token = bearer_token(authorization)
    if token is not None:
        return None, token
    basic = _BASIC.fullmatch(authorization)
    if basic is None:
        raise LoginFailed("the credentials are neither Basic nor Bearer")
    try:
        text = base64.b64decode(basic[1], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise LoginFailed("the credentials are malformed") from None
    user, colon, password = text.partition(":")
    if not colon:
        raise LoginFailed("the credentials are malformed")
    return user, password
