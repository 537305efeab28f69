"""May what is cached be served as it is: pure functions of (record, policy, now, upstream answer).

Lives here: ``pull_policy``, ``tag_ttl`` and ``serve_stale``, as typed decisions (the terms are
those of Kubernetes' image pull policy and of RFC 9111), about tags and about who may read what.
Must not know: I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from mirror.config.settings import Upstream
from mirror.oci.errors import MirrorError, UpstreamError
from mirror.oci.reference import Digest
from mirror.store.records import AccessRecord, TagRecord

ACCESS_TTL_S: Final = 86400.0
"""Seconds for which an upstream's word that a repository has a digest is believed unasked."""
PATIENCE: Final = 5.0
"""Seconds that an upstream may take to confirm what is held."""


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


def decide_tag(
    record: TagRecord | None, held: Digest | None, upstream: Upstream, now: float
) -> Decision | Stale:
    """What a tag needs before ``held`` is served for it: what it is, or was; None: nothing is here.

    What a tag was is never fresh. Where nobody may be asked it stands in, as it does for an
    upstream that fails.
    """
    if record is None or held is None:
        return decide(None, upstream, now)
    if held == record.digest:
        return decide(record.confirmed, upstream, now)
    decision = decide(None, upstream, now)
    if isinstance(decision, Refuse) and upstream.serve_stale:
        return Stale("the tag has moved on to what is not here")
    return decision


def decide_access(known: AccessRecord | None, upstream: Upstream, now: float) -> Decision:
    """What content needs before it is read through a repository; ``known`` says why it may be.

    What a manifest that was pulled through the repository refers to is known for good; the
    upstream's word for it ends. It was given at most :data:`PROVEN_FOR` before its end: one that
    ends later was given by a clock that ran ahead.
    """
    if upstream.pull_policy == "Never":
        return Fresh() if known is not None else Refuse()
    if known is None:
        return Ask()
    believed = known.expires_at is None or 0 <= known.expires_at - now <= ACCESS_TTL_S
    return Fresh() if believed else Ask()


def patience(upstream: Upstream, *, held: bool) -> float | None:
    """Seconds to wait for an upstream; None (as long as it takes) where nothing may stand in."""
    return PATIENCE if held and upstream.serve_stale else None


def after_failure(error: MirrorError, upstream: Upstream, *, held: bool) -> Fallback:
    """What is answered when the upstream did not confirm. A no (401, 403, 404) is an answer."""
    if held and upstream.serve_stale and isinstance(error, UpstreamError):
        return Stale(error.message)
    return Fail()
