"""Which rules of access never decide, because rules before them fit all that they fit.

Lives here: whether one pattern of repositories has all that another one has, and the same for
``who``. Must not know: requests, the section that has the rules.

The answer is on the safe side: a rule that is found never decides, and some that never decide are
not found.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

EVERYBODY: Final = "anonymous"
"""In ``who``: every client, also one that has not logged in."""
LOGGED_IN: Final = "authenticated"
"""In ``who``: every client that has logged in."""
GROUP: Final = "group:"
"""In ``who``: what comes before the name of a group."""


@dataclass(frozen=True, slots=True)
class RuleScope:
    """The requests that a rule is about."""

    repositories: tuple[str, ...]
    who: tuple[str, ...]


def find_covering(
    scope: RuleScope, earlier: Sequence[RuleScope], groups: Mapping[str, Collection[str]]
) -> int | None:
    """Return the index of the last earlier rule without which a rule might decide.

    None if the rule can decide.

    Args:
        scope: The rule.
        earlier: The rules before it, in their order.
        groups: The users of each group that the configuration has.
    """
    last = 0
    for pattern in scope.repositories:
        for member in scope.who:
            index = next(
                (
                    index
                    for index, one in enumerate(earlier)
                    if any(has_all_repositories(broad, pattern) for broad in one.repositories)
                    and any(_has_all_clients(broad, member, groups) for broad in one.who)
                ),
                None,
            )
            if index is None:
                return None
            last = max(last, index)
    return last


def has_all_repositories(broad: str, narrow: str) -> bool:
    """Return whether a pattern matches each name that another one matches, as far as is known."""
    return _has_all_components(broad.split("/"), narrow.split("/"))


def _has_all_components(broad: Sequence[str], narrow: Sequence[str]) -> bool:
    if not broad:
        return not narrow
    first, rest = broad[0], broad[1:]
    if first == "**":
        if not rest:
            return bool(narrow)  # At the end, it stands for at least one component.
        has_skipped = bool(narrow) and _has_all_components(broad, narrow[1:])
        return has_skipped or _has_all_components(rest, narrow)
    if not narrow or narrow[0] == "**":
        return False
    # A * of the narrow pattern is in no name. So only a * of the broad one matches it, and with it
    # all that it stands for.
    component = re.escape(first).replace(r"\*", ".*")
    is_within = re.fullmatch(component, narrow[0]) is not None
    return is_within and _has_all_components(rest, narrow[1:])


def _has_all_clients(broad: str, narrow: str, groups: Mapping[str, Collection[str]]) -> bool:
    if broad in (EVERYBODY, narrow):
        return True
    if narrow == EVERYBODY:
        return False
    members = groups.get(broad.removeprefix(GROUP), ()) if broad.startswith(GROUP) else ()
    return broad == LOGGED_IN or narrow in members
