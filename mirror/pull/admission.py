"""May this be served, or what instead: decided before the first byte, cold or warm.

Lives here: the rules, as pure functions with typed answers. Must not know: I/O, caches.
Cooldown of new tags, signatures and verdicts come into this room and no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from mirror.config.settings import Upstream
from mirror.oci.reference import Digest, Repository


@dataclass(frozen=True, slots=True)
class Serve:
    """Nothing stands against it."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """It is not served. ``code`` is an OCI error code."""

    code: str
    why: str


@dataclass(frozen=True, slots=True)
class Instead:
    """Another digest is served in its place."""

    digest: Digest


Admission: TypeAlias = Serve | Refuse | Instead
_SERVE = Serve()


def admit(repository: Repository, upstream: Upstream) -> Admission:
    """The allow- and deny-lists of an upstream. A deny-list wins over an allow-list.

    Patterns are shell-style, matched against the repository's path (``library/*``).
    """
    path = repository.path
    if any(fnmatchcase(path, pattern) for pattern in upstream.deny):
        return Refuse("DENIED", "this repository is on the mirror's deny-list")
    if upstream.allow and not any(fnmatchcase(path, pattern) for pattern in upstream.allow):
        return Refuse("DENIED", "this repository is not on the mirror's allow-list")
    return _SERVE
