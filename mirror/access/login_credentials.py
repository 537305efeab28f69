"""All who may log in: the users, tokens and issuers of a configuration.

Lives here: which files and key sets there are, and their refresh. Must not know: requests, rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from mirror.access.access_tokens import TOKENS_REMEDY, AccessTokens, parse_tokens
from mirror.access.issuers import (
    KeysUnavailable,
    KeyUnknown,
    TokenRefused,
    ValidToken,
    check_token,
    issuer_of,
)
from mirror.access.key_sets import KEYS_REMEDY, FetchedKeySet, FetchKeys, Keys, parse_key_set
from mirror.access.known_names import KnownNames
from mirror.access.users import USERS_REMEDY, PasswordCheck, parse_users
from mirror.access.watched_file import MessagePrefix, WatchedFile, dotted_prefix
from mirror.config.access import AccessSection, Issuer
from mirror.oci.errors import ConfigError, Draining
from mirror.single_flight import Key, SingleFlight

_KEYS_TIMEOUT_S: Final = 5.0
"""Seconds that a token with an unknown key waits for the keys of its issuer."""
_SAVE_RETRY_S: Final = 60.0
"""Seconds after which the names of users are written again, if the disk has refused them."""


@dataclass(frozen=True, slots=True)
class FileNames:
    """The users and groups in the files of users and tokens."""

    users: frozenset[str]
    groups: frozenset[str]

    @classmethod
    def of(cls, passwords: PasswordCheck | None, tokens: AccessTokens) -> FileNames:
        """Return the names in the content of both files. ``passwords``: None without its file."""
        identities = [token.identity for token in tokens.values()]
        users = {identity.user for identity in identities}
        return cls(
            users=frozenset(users.union(() if passwords is None else passwords.names)),
            groups=frozenset(group for identity in identities for group in identity.groups),
        )


@dataclass(frozen=True, slots=True)
class _IssuerKeys:
    """An issuer, with its keys from a file or from a URL."""

    settings: Issuer
    source: WatchedFile[Keys] | FetchedKeySet

    def keys(self, now: float) -> Keys:
        """Return the keys at ``now``, in seconds since the epoch."""
        source = self.source
        return source.keys(now) if isinstance(source, FetchedKeySet) else source.content

    @property
    def has_current_keys(self) -> bool:
        """Whether all keys of the issuer are known: a token with another key is invalid then."""
        source = self.source
        return source.is_current if isinstance(source, FetchedKeySet) else bool(source.content)


class LoginCredentials:
    """The users, tokens and issuers of one configuration."""

    def __init__(
        self,
        access: AccessSection,
        fetch: FetchKeys,
        single_flight: SingleFlight,
        now: Callable[[], float],
        report: Callable[[str], None],
        names: KnownNames,
    ) -> None:
        """Read the files.

        Args:
            access: The section of the configuration.
            fetch: Fetches the key sets of URLs.
            single_flight: Runs these fetches.
            now: Returns the seconds since the epoch.
            report: Receives the reason if a file or a URL cannot be used, in one line.
            names: Remembers the names of users. They are added once :meth:`refresh` is called.

        Raises:
            ConfigError: A file cannot be used.
        """
        self._single_flight = single_flight
        self._now = now
        self._report = report
        self._reported: dict[str, str] = {}
        """Key set, or file of names -> the failure that was reported last."""
        self._names = names
        self._save_due = 0.0
        self._users = _users_of(access)
        self._tokens = _tokens_of(access)
        self.issuers = {
            one.issuer: _IssuerKeys(one, _key_source(index, one, fetch))
            for index, one in enumerate(access.issuers)
        }
        """Name of each issuer -> the issuer."""
        for file in self._files():
            file.read_strictly()
        self._file_names = FileNames.of(self.passwords, self.tokens)

    @property
    def passwords(self) -> PasswordCheck | None:
        """Checks passwords. None: there is no file of users."""
        return None if self._users is None else self._users.content

    @property
    def tokens(self) -> AccessTokens:
        """The tokens of the file."""
        return {} if self._tokens is None else self._tokens.content

    def _files(self) -> Sequence[WatchedFile[Any]]:
        sources = [one.source for one in self.issuers.values()]
        files = [self._users, self._tokens, *sources]
        return [file for file in files if isinstance(file, WatchedFile)]

    def refresh(self) -> bool:
        """Read the files that have changed, and start to fetch key sets that are due.

        Blocks for the files, which are small. Returns whether a file has changed. The names of
        users are remembered from now on, and written in the background.
        """
        changed = [file for file in self._files() if file.has_changed()]
        for file in changed:
            for problem in file.read():
                self._report(problem)
        if changed:
            self._file_names = FileNames.of(self.passwords, self.tokens)
        now = self._now()
        for issuer in self.issuers.values():
            if isinstance(issuer.source, FetchedKeySet) and issuer.source.is_due(now):
                self._fetch(issuer.source)
        has_changed = self._names.refresh(self._file_names.users) or bool(changed)
        if self._names.has_unsaved and now >= self._save_due:
            self._run(("user-names",), self._save_names)
        return has_changed

    async def check_jwt(self, token: str) -> ValidToken:
        """Check a JWT. Raises ``TokenRefused``, and ``KeysUnavailable`` if it may be valid."""
        issuer = self.issuers.get(issuer_of(token))
        if issuer is None:
            raise TokenRefused("its issuer is not one of access.issuers")
        try:
            valid = check_token(token, issuer.settings, issuer.keys(self._now()), self._now)
        except KeyUnknown:
            source = issuer.source
            if isinstance(source, FetchedKeySet) and source.is_due(
                self._now(), is_key_unknown=True
            ):
                await self._wait_for_keys(source)
            try:
                valid = check_token(token, issuer.settings, issuer.keys(self._now()), self._now)
            except KeyUnknown:
                if issuer.has_current_keys:
                    raise
                raise KeysUnavailable("the keys of its issuer cannot be read now") from None
        # With a prefix, no name in the files is one of the issuer's.
        if not issuer.settings.user_prefix:
            reason = self._names.reason_to_refuse(valid.identity.user)
            if reason:
                raise TokenRefused(reason)
        return valid

    async def _wait_for_keys(self, source: FetchedKeySet) -> None:
        with suppress(TimeoutError, Draining):
            async with asyncio.timeout(_KEYS_TIMEOUT_S):
                await self._single_flight.share(
                    ("key-set", source.url), lambda: self._refresh_keys(source)
                )

    def _fetch(self, source: FetchedKeySet) -> None:
        self._run(("key-set", source.url), lambda: self._refresh_keys(source))

    def _run(self, key: Key, work: Callable[[], Awaitable[None]]) -> None:
        with suppress(Draining):
            self._single_flight.run(key, work)

    async def _refresh_keys(self, source: FetchedKeySet) -> None:
        failure = await source.refresh(self._now())
        self._report_once(source.url, failure and f"access.issuers: {failure}")

    async def _save_names(self) -> None:
        self._save_due = self._now() + _SAVE_RETRY_S
        failure = await self._names.save()
        if not failure:
            self._save_due = 0.0
        self._report_once("names", failure)

    def _report_once(self, source: str, failure: str) -> None:
        """Report the failure of a source, unless it is that of the last time. Empty: none."""
        if failure and failure != self._reported.get(source):
            self._report(failure)
        self._reported[source] = failure


def check_files(access: AccessSection, prefix: MessagePrefix = dotted_prefix) -> FileNames:
    """Read all files of a configuration. Returns the names in them.

    Raises ``ConfigError`` for all that is wrong. ``prefix``: begins each line of it.
    """
    key_files = [
        _key_file(index, one) for index, one in enumerate(access.issuers) if not one.has_key_url
    ]
    users, tokens = _users_of(access), _tokens_of(access)
    files: list[WatchedFile[Any] | None] = [users, tokens, *key_files]
    problems = [problem for file in files if file is not None for problem in file.read(prefix)]
    if problems:
        raise ConfigError(problems[0], problems[1:])
    return FileNames.of(
        None if users is None else users.content, {} if tokens is None else tokens.content
    )


def _users_of(access: AccessSection) -> WatchedFile[PasswordCheck] | None:
    if access.users is None:
        return None
    parse = partial(parse_users, reserved=access.user_prefixes)
    return WatchedFile(("access", "users"), access.users, parse, USERS_REMEDY)


def _tokens_of(access: AccessSection) -> WatchedFile[AccessTokens] | None:
    if access.tokens is None:
        return None
    parse = partial(
        parse_tokens, reserved=access.user_prefixes, reserved_groups=access.group_prefixes
    )
    return WatchedFile(("access", "tokens"), access.tokens, parse, TOKENS_REMEDY)


def _key_source(index: int, issuer: Issuer, fetch: FetchKeys) -> WatchedFile[Keys] | FetchedKeySet:
    if issuer.has_key_url:
        return FetchedKeySet(issuer.jwks, issuer.ca, fetch)
    return _key_file(index, issuer)


def _key_file(index: int, issuer: Issuer) -> WatchedFile[Keys]:
    key = ("access", "issuers", index, "jwks")
    return WatchedFile(key, issuer.jwks, parse_key_set, KEYS_REMEDY)
