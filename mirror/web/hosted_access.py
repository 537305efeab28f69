"""What the push listener asks before it does something: who is the client, and may it do this?

Lives here: the question, and who answers it. Must not know: how users are known, which rules there
are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from mirror.access.access_control import AccessControl
from mirror.access.identity import AccessRight
from mirror.oci.errors import Denied
from mirror.oci.reference import Repository


class AccessAction(StrEnum):
    """The kind of thing that a request does."""

    PING = "ping"
    """``/v2/``: clients look there whether they have to log in."""
    LIST = "list"
    """List repositories. The list has those that the client may pull from."""
    PULL = "pull"
    PUSH = "push"
    DELETE = "delete"
    ADMIN = "admin"
    """Delete what is immutable."""


@dataclass(frozen=True, slots=True)
class AccessAttempt:
    """A request, as far as access is concerned."""

    action: AccessAction
    repository: Repository | None
    """None for ``PING`` and ``LIST``."""
    authorization: str | None
    """The header field ``Authorization``, as sent. None without one."""
    client: str
    """The address of the client."""


Authorize: TypeAlias = Callable[[AccessAttempt], Awaitable[str]]
"""Returns the name of the user, empty for an anonymous one. Raises ``LoginRequired`` if the client
has to send credentials, or has sent wrong ones, and ``Denied`` if the user may not do this."""


async def allow_everybody(attempt: AccessAttempt) -> str:
    """Allow everything to everybody, as an anonymous user, who is no admin. Raises ``Denied``."""
    if attempt.action is AccessAction.ADMIN:
        raise Denied("only an admin may do this, and the configuration names none")
    return ""


def authorize_by(access: AccessControl) -> Authorize:
    """Return a function that asks the rules of the configuration, if it has any."""

    async def authorize(attempt: AccessAttempt) -> str:
        if not access.is_enforced:
            return await allow_everybody(attempt)
        action = attempt.action
        identity = await access.check_push_door(
            attempt.authorization,
            attempt.client,
            None if action in (AccessAction.PING, AccessAction.LIST) else AccessRight(action.value),
            attempt.repository,
            is_ping=action is AccessAction.PING,
        )
        return identity.user

    return authorize
