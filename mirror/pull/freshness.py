"""Decide whether cached content may be served as it is.

Lives here: ``pull_policy``, ``tag_ttl`` and ``serve_stale`` as pure functions with typed results,
for tags and for access to content. The terms are those of Kubernetes' image pull policy and of RFC
9111. Must not know: I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from mirror.config.settings import Upstream
from mirror.observability.traces import PullTrace
from mirror.oci.errors import ManifestInvalid, MirrorError, UpstreamError
from mirror.oci.reference import Digest
from mirror.store.records import AccessRecord, TagRecord

ACCESS_TTL_S: Final = 86400.0
"""Seconds (one day) for which access is served unasked after the upstream granted it."""
CONFIRM_TIMEOUT_S: Final = 5.0
"""Seconds that an upstream may take to confirm cached content. After that the content is served as
stale, before the client gives up."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """The cached result is served without asking the upstream."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The upstream is asked first."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing usable is cached, and the pull policy forbids a request to the upstream."""


@dataclass(frozen=True, slots=True)
class Stale:
    """The cached result is served because the upstream failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """No fallback: the client gets the upstream's error."""


Decision: TypeAlias = Fresh | Ask | Refuse
Fallback: TypeAlias = Stale | Fail


def is_fresh(confirmed: float | None, upstream: Upstream, now: float) -> bool:
    """Return whether a cached tag or list is fresh (RFC 9111, section 4.2).

    Args:
        confirmed: When the upstream last confirmed the cached digest or sent the list, in seconds
            since the epoch. None if nothing is cached. A time in the future (the clock was set
            back) is not fresh.
        upstream: Settings of the upstream.
        now: The current time, in seconds since the epoch.
    """
    if confirmed is None:
        return False
    match upstream.pull_policy:
        case "Never":
            return True
        case "Always":
            return False
        case "IfNotPresent":
            return 0 <= now - confirmed < upstream.tag_ttl


def decide_by_age(confirmed: float | None, upstream: Upstream, now: float) -> Decision:
    """Decide whether a cached tag or list may be served, by its age.

    Args:
        confirmed: As for :func:`is_fresh`.
        upstream: Settings of the upstream.
        now: The current time, in seconds since the epoch.
    """
    if is_fresh(confirmed, upstream, now):
        return Fresh()
    return Refuse() if upstream.pull_policy == "Never" else Ask()


def decide_tag(
    record: TagRecord | None, cached: Digest | None, upstream: Upstream, now: float
) -> Decision | Stale:
    """Decide whether ``cached`` may be served for a tag.

    An earlier digest of the tag is never fresh. It is served stale if ``serve_stale`` is set and
    the pull policy forbids a request to the upstream.

    Args:
        record: The record of the tag. None if the tag is not known.
        cached: The digest of a cached manifest, which the tag has or had. None if there is none.
        upstream: Settings of the upstream.
        now: The current time, in seconds since the epoch.
    """
    if record is None or cached is None:
        return decide_by_age(None, upstream, now)
    if cached == record.digest:
        return decide_by_age(record.confirmed, upstream, now)
    decision = decide_by_age(None, upstream, now)
    if isinstance(decision, Refuse) and upstream.serve_stale:
        return Stale("the tag has moved to content that is not cached")
    return decision


def trace_tag(record: TagRecord | None, upstream: Upstream, now: float) -> PullTrace:
    """Return why the upstream is asked for a tag.

    Args:
        record: As for :func:`decide_tag`.
        upstream: Settings of the upstream.
        now: The current time, in seconds since the epoch.
    """
    if record is None:
        return PullTrace()
    return PullTrace(
        tag_age=now - record.confirmed,
        tag_ttl=upstream.tag_ttl if upstream.pull_policy == "IfNotPresent" else None,
        previous_digest=str(record.digest),
    )


def decide_access(access_record: AccessRecord | None, upstream: Upstream, now: float) -> Decision:
    """Decide whether content may be read through a repository without asking the upstream.

    A reference from a manifest that was pulled through the repository does not expire. Access that
    the upstream granted expires after :data:`ACCESS_TTL_S`. A record that expires later than that
    was written while the clock ran ahead, and is not fresh.

    Args:
        access_record: The record that the repository refers to the content. None: there is none.
        upstream: Settings of the upstream.
        now: The current time, in seconds since the epoch.
    """
    if upstream.pull_policy == "Never":
        return Fresh() if access_record is not None else Refuse()
    if access_record is None:
        return Ask()
    expires_at = access_record.expires_at
    is_granted = expires_at is None or 0 <= expires_at - now <= ACCESS_TTL_S
    return Fresh() if is_granted else Ask()


def confirm_timeout(upstream: Upstream, *, has_fallback: bool) -> float | None:
    """Return the seconds to wait for an upstream.

    None: no limit, because no cached result may be served instead.
    """
    return CONFIRM_TIMEOUT_S if has_fallback and upstream.serve_stale else None


def after_failure(error: MirrorError, upstream: Upstream, *, has_fallback: bool) -> Fallback:
    """Decide whether a cached result is served although the upstream failed.

    A refusal (401, 403, 404) is the upstream's decision, and no failure. An upstream that sends a
    manifest which cannot be served has not failed either: an older one would hide it.

    Args:
        error: The failure.
        upstream: Settings of the upstream.
        has_fallback: Whether a cached result could be served.
    """
    is_failure = isinstance(error, UpstreamError) and not isinstance(error, ManifestInvalid)
    return Stale(error.message) if has_fallback and upstream.serve_stale and is_failure else Fail()
