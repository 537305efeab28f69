"""Who may do what: the interface of this package, for ``web`` and ``server``.

Lives here: the two questions that both listeners ask, who is this client, and may it do this, and
the change of configuration. Must not know: HTTP, which listener asks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from mirror.access.identity import ANONYMOUS, Identity
from mirror.access.key_sets import FetchKeys
from mirror.access.known_names import KnownNames
from mirror.access.login_credentials import LoginCredentials
from mirror.access.logins import ClientLogins, LoginFailed
from mirror.access.rules import Rules
from mirror.config.access import AccessAction
from mirror.config.settings import Settings
from mirror.observability.events import LogMessage, Observer
from mirror.oci.errors import Denied, LoginRequired, TooManyRequests
from mirror.oci.reference import Repository
from mirror.single_flight import SingleFlight
from mirror.store.layout import Layout

_VERBS: Final = {
    AccessAction.PULL: "pull from",
    AccessAction.PUSH: "push to",
    AccessAction.DELETE: "delete from",
    AccessAction.ADMIN: "administrate",
}


class AccessControl:
    """The section ``access`` in force. Without it, everybody may do all that needs no admin."""

    def __init__(
        self,
        settings: Settings,
        fetch: FetchKeys,
        single_flight: SingleFlight,
        emit: Observer,
        now: Callable[[], float],
    ) -> None:
        """Read the files of the configuration.

        Args:
            settings: The configuration.
            fetch: Fetches the key sets of URLs.
            single_flight: Runs these fetches.
            emit: Receives log messages.
            now: Returns the seconds since the epoch.

        Raises:
            ConfigError: A file cannot be used.
        """
        self._fetch = fetch
        self._single_flight = single_flight
        self._emit = emit
        self._now = now
        self._rules: Rules | None = None
        self.is_enforced = False
        """Whether there are rules. Without any, everybody may do all that needs no admin."""
        # Of a text of its own, because lines of one text are limited: nobody who sends bad tokens
        # must suppress what is wrong with a file.
        self._logins = ClientLogins(now, partial(self._warn, "a token was refused"))
        self._names = KnownNames(Layout(Path(settings.data_dir)).user_names)
        self._realm = ""
        self.prepare(settings)()

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Read the files of a configuration. Returns a function that uses it for new requests.

        Raises ``ConfigError`` if a file cannot be used.
        """
        access, hosted = settings.access, settings.hosted
        credentials = None
        if access is not None and access.has_login:
            credentials = LoginCredentials(
                access,
                self._fetch,
                self._single_flight,
                self._now,
                partial(self._warn, "credentials cannot be used"),
                self._names,
            )
        hosted_name = None if hosted is None else hosted.name
        rules = None if access is None else Rules(access, hosted_name, settings.registry_names())

        def use() -> None:
            self._logins.use(credentials)
            self._rules = rules
            self.is_enforced = rules is not None
            self._realm = hosted_name or ""
            self.refresh()

        return use

    def _warn(self, what: str, why: str) -> None:
        self._emit(LogMessage("warning", what, (("why", why),)))

    def refresh(self) -> None:
        """Read the files of credentials that have changed. Blocks for them; they are small."""
        self._logins.refresh()

    def close(self) -> None:
        """End the threads."""
        self._logins.close()

    # --- the questions --------------------------------------------------------------------------

    def is_allowed(self, identity: Identity, repository: Repository, action: AccessAction) -> bool:
        """Return whether a client may do something with a repository.

        Args:
            identity: The client.
            repository: The repository, which need not exist.
            action: What the client wants to do.
        """
        if self._rules is None:
            return action is not AccessAction.ADMIN
        return self._rules.is_allowed(identity, repository, action)

    def is_pull_refused(self, identity: Identity, repository: Repository) -> bool:
        """Return whether a rule forbids a client to pull. False if no rule fits.

        For content that is served under an upstream's name: the rules of the upstream's repository
        permit it, and those of the hosted repository can only forbid it.
        """
        return self._rules is not None and self._rules.is_pull_refused(identity, repository)

    def is_public(self, repository: Repository) -> bool:
        """Return whether everybody may pull from a repository, so that shared caches may store it.

        ``repository``: it need not exist.
        """
        return self.is_allowed(ANONYMOUS, repository, AccessAction.PULL)

    async def identify(self, authorization: str | None, client: str) -> Identity:
        """Return the identity of the client that sends an ``Authorization`` header field, or none.

        Args:
            authorization: The field, as sent. None without one.
            client: Address of the client.

        Raises:
            LoginRequired: The credentials are wrong.
            TooManyRequests: The address has failed too often.
        """
        if authorization is None or self._rules is None:
            return ANONYMOUS
        try:
            return await self._logins.identify(authorization, client)
        except LoginFailed as error:
            raise self._challenge(str(error)) from None

    async def check_at_push_listener(
        self,
        authorization: str | None,
        client: str,
        action: AccessAction | None,
        repository: Repository | None,
        *,
        is_ping: bool = False,
    ) -> Identity:
        """Return the identity of a client at the push listener, which may do what it asks.

        Args:
            authorization: The header field, as sent. None without one.
            client: Address of the client.
            action: What it does. None: nothing with a repository.
            repository: The repository. None: the request is about none, or about all.
            is_ping: True for ``/v2/``, where clients look whether they have to log in.

        Raises:
            LoginRequired: The client has to log in, or its credentials are wrong.
            Denied: The user may not do this.
            TooManyRequests: The address has failed too often.
        """
        identity = await self.identify(authorization, client)
        rules = self._rules
        if is_ping and identity.is_anonymous and rules is not None and rules.is_login_needed():
            # docker, skopeo and others keep credentials only if they are asked for them here.
            raise self._challenge("log in to use these repositories")
        if action is None or repository is None:
            return identity
        if self.is_allowed(identity, repository, action):
            return identity
        if rules is None:
            raise Denied("only an admin may do this, and the configuration names none")
        if identity.is_anonymous:
            raise self._challenge(f"log in to {_VERBS[action]} this repository")
        raise _deny(identity, action)

    async def check_pull(
        self, authorization: str | None, client: str, repository: Repository
    ) -> Identity:
        """Return the identity of a client at the mirror's listener, which may pull.

        Credentials are honoured, and never asked for: a user is decided as that user, as at
        the push listener. What everybody may do, a client with wrong ones may do, too: clients also
        send those of upstreams.

        Args:
            authorization: The header field, as sent. None without one.
            client: Address of the client.
            repository: The repository, which need not exist.

        Raises:
            Denied: The client may not pull from it, whether it exists or not.
            TooManyRequests: The address has failed too often.
        """
        if authorization is None:
            identity = ANONYMOUS
        elif self.is_public(repository):
            identity = await self._find_user(authorization, client)
        else:
            try:
                identity = await self.identify(authorization, client)
            except LoginRequired as error:
                raise Denied(error.message) from None
        if self.is_allowed(identity, repository, AccessAction.PULL):
            return identity
        if identity.is_anonymous:
            raise Denied(
                "pulling from this repository needs credentials, and this listener asks for none:"
                " pull from the push listener, or configure the client to send them"
                " (oci-mirror clients --credentials-file)"
            )
        raise _deny(identity, AccessAction.PULL)

    async def may_list(
        self, authorization: str | None, client: str
    ) -> tuple[Identity, Callable[[Repository], bool]]:
        """Return the identity, and a function that says which repositories a list may name to it.

        With wrong credentials, it is those that everybody may pull from.
        """
        identity = await self._find_user(authorization, client)

        def is_visible(repository: Repository) -> bool:
            return self.is_allowed(identity, repository, AccessAction.PULL)

        return identity, is_visible

    async def _find_user(self, authorization: str | None, client: str) -> Identity:
        """Return the identity of a client that needs no login. With wrong credentials, or none, and
        after too many failures, it is anonymous."""
        if authorization is None or self._rules is None:
            return ANONYMOUS
        try:
            return await self._logins.identify(authorization, client, is_needed=False)
        except (LoginFailed, TooManyRequests):
            return ANONYMOUS

    def _challenge(self, message: str) -> LoginRequired:
        return LoginRequired(message, f'Basic realm="{self._realm}"')


def _deny(identity: Identity, action: AccessAction) -> Denied:
    """Return the error for a user who may not do something. It names the user, for the log."""
    error = Denied(
        f"the user {identity.user} may not {_VERBS[action]} this repository: ask the operator for a"
        " rule in access.rules"
    )
    error.user = identity.user
    return error
