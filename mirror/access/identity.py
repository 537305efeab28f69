"""The user behind a request, and the actions that rules are about.

Lives here: the types that the modules of this package share. Must not know: how a client proves who
it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Action(StrEnum):
    """The actions in the ``may`` of a rule."""

    __hash__ = str.__hash__

    PULL = "pull"
    PUSH = "push"
    DELETE = "delete"
    ADMIN = "admin"
    """All others, and what only administrators may do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A client, as far as rules are concerned."""

    user: str = ""
    """Name of the user. Empty: the client has not logged in."""
    groups: frozenset[str] = frozenset()

    @property
    def is_anonymous(self) -> bool:
        """Whether the client has not logged in."""
        return not self.user


ANONYMOUS: Final = Identity()
