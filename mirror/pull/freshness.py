"""May a cached tag be served as it is: pure functions of (record, policy, now, upstream answer).

Lives here: ``pull_policy``, ``tag_ttl`` and ``serve_stale``, as typed decisions (the terms are
those of Kubernetes' image pull policy and of RFC 9111). Must not know: I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from mirror.config import Upstream
from mirror.oci.errors import MirrorError, UpstreamError


@dataclass(frozen=True, slots=True)
class Fresh:
    """The cached answer is served without a question."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The upstream is asked first."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """It is not here, and the policy forbids to ask."""


@dataclass(frozen=True, slots=True)
class Stale:
    """The cached answer is served because the upstream could not be asked."""

    why: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The upstream's answer, or its failure, is the answer."""


Decision: TypeAlias = Fresh | Ask | Refuse
Fallback: TypeAlias = Stale | Fail


def decide(confirmed: float | None, upstream: Upstream, now: float) -> Decision:
    """What a cached tag needs before it is served.

    ``confirmed``: when the upstream last said that this tag is what we hold, in seconds since the
    epoch; None if we do not hold it. A time in the future (a clock that was set back) is not fresh.
    """
    match upstream.pull_policy:
        case "Never":
            return Fresh() if confirmed is not None else Refuse()
        case "Always":
            return Ask()
        case "IfNotPresent":
            fresh = confirmed is not None and 0 <= now - confirmed < upstream.tag_ttl
            return Fresh() if fresh else Ask()


def after_failure(error: MirrorError, upstream: Upstream, *, held: bool) -> Fallback:
    """What is answered when the upstream did not confirm. A no (401, 403, 404) is an answer."""
    if held and upstream.serve_stale and isinstance(error, UpstreamError):
        return Stale(error.message)
    return Fail()
