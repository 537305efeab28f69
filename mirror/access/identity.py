"""The user behind a request.

Lives here: the type that the modules of this package share. Must not know: how a client proves who
it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Identity:
    """The user and groups of a client. Rules decide by them alone."""

    user: str = ""
    """Name of the user. Empty: the client has not logged in."""
    groups: frozenset[str] = frozenset()

    @property
    def is_anonymous(self) -> bool:
        """Whether the client has not logged in."""
        return not self.user


ANONYMOUS: Final = Identity()
