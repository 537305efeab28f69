"""Decide whether a repository may be served.

Called before anything is read or fetched, also for cached content.

Lives here: the rules, as pure functions with typed results. Must not know: I/O, caches.

Every future rule belongs into this module. A rule about a tag or about content (its age, its
signature) needs a second function, because ``admit`` is called before they are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from mirror.config.settings import Upstream
from mirror.oci.reference import Repository


@dataclass(frozen=True, slots=True)
class Allow:
    """The repository may be served."""


@dataclass(frozen=True, slots=True)
class Deny:
    """The repository is not served."""

    reason: str


Admission: TypeAlias = Allow | Deny
_ALLOW = Allow()


def admit(repository: Repository, upstream: Upstream) -> Admission:
    """Apply the allow-list and the deny-list of an upstream. The deny-list wins.

    Patterns are shell-style, matched against the repository's path (``library/*``).
    """
    path = repository.path
    if any(fnmatchcase(path, pattern) for pattern in upstream.deny):
        return Deny("this repository is on the mirror's deny-list")
    if upstream.allow and not any(fnmatchcase(path, pattern) for pattern in upstream.allow):
        return Deny("this repository is not on the mirror's allow-list")
    return _ALLOW
