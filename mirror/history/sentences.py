"""Say in sentences what happened to one request, and why it took its time.

Lives here: pure functions of a stored request. Must not know: where it is stored, how sentences are
shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mirror.history.stored_pull import StoredPull
from mirror.observability.events import Kind, Outcome
from mirror.oci.text import count_text, size_text

_SHOWN_S: Final = 0.05
"""Seconds. A shorter stage is not why a request took long."""
_RATED_BYTES: Final = 1024 * 1024
"""Bytes from which a rate is stated: less is in the buffers of the kernel."""
_RATED_S: Final = 0.1
"""Seconds from which a rate is stated, for the same reason."""
_UPSTREAM_SHARE: Final = 0.5
"""Part of the time of a response that it waited for bytes. From this on, the upstream is said to be
the bottleneck."""
_SHOWN_DIGEST_CHARS: Final = 19
"""Characters of a digest: its algorithm and 12 hexadecimal digits, as Docker prints it."""
_UNCACHED: Final = {
    "full": "there was no room on the disk (oci-mirror doctor)",
    "readonly": "the disk is read-only, or the mirror may not write there",
    "descriptors": "the mirror had too few descriptors",
    "removed": "its file was removed while it was written",
    "io": "the disk refused it",
}
"""Label of a refusal (:func:`mirror.store.disk.reason_of`) -> why content is not stored."""
_MEGABYTE: Final = 1_000_000
"""Bytes of a megabyte: rates of networks are decimal."""


def explain(pull: StoredPull) -> list[str]:
    """Return sentences: the reason for the outcome first, then the times in their order."""
    return [*_reasons(pull), *_times(pull), *_rates(pull), *_end(pull)]


def _reasons(pull: StoredPull) -> Iterator[str]:
    if pull.is_frozen:
        yield "The tag is frozen (oci-mirror freeze), so the upstream was not asked for it."
    match Outcome(pull.outcome) if pull.outcome in set(Outcome) else None:
        case Outcome.HIT:
            yield "Hit: it was on the disk, and the upstream was not asked."
        case Outcome.JOIN:
            yield _join_reason(pull)
        case Outcome.MISS:
            yield f"Miss: {_miss_reason(pull)}"
        case Outcome.ASIDE:
            yield (
                "Aside: the range was far ahead of the fetch of its blob, so it was requested by "
                f"itself ({size_text(pull.aside_bytes)}). It is not stored."
            )
        case Outcome.REVALIDATED:
            yield f"Revalidated: {_revalidation_reason(pull)}"
        case Outcome.STALE:
            age = "" if pull.tag_age is None else f" It was last confirmed {_ago(pull.tag_age)}."
            yield f"Stale: the cached copy was served (serve_stale), because {pull.warning}.{age}"
        case Outcome.NEGATIVE:
            yield f"Not found: {_error(pull)}"
        case Outcome.DENIED:
            yield f"Refused: {_error(pull)}"
        case Outcome.PUSHED:
            yield "Pushed: it is a step of a push to a hosted repository, or its end."
        case Outcome.DELETED:
            yield "Deleted: a client deleted it from a hosted repository."
        case Outcome.REJECTED:
            yield f"Rejected: the request itself was wrong: {_error(pull)}"
        case _:
            yield f"Failed: {_error(pull)}"
    if pull.uncached in _UNCACHED:
        why = _UNCACHED[pull.uncached]
        yield f"It was served, but not stored: {why}. The next request fetches it again."


def _error(pull: StoredPull) -> str:
    return f"{pull.error.rstrip('.') or 'no reason was recorded'}."


def _join_reason(pull: StoredPull) -> str:
    joined = pull.joined_at_byte or 0
    if not pull.size:
        return f"Join: another request was fetching it already, and had {size_text(joined)}."
    return (
        f"Join: another request was fetching it already. Joined at {100 * joined // pull.size} % "
        f"({size_text(joined)} of {size_text(pull.size)})."
    )


def _miss_reason(pull: StoredPull) -> str:
    if pull.is_damaged:
        return "it was on the disk, and damaged: it was moved to quarantine/, and fetched again."
    is_tag = pull.kind == Kind.MANIFEST.value and ":" not in pull.reference
    if is_tag and not pull.previous_digest:
        return "the tag was not known: it was not pulled here before, or was removed (rm, prune)."
    if is_tag and pull.digest and pull.digest != pull.previous_digest:
        return (
            f"the tag had moved from {_short(pull.previous_digest)} to {_short(pull.digest)}, "
            "which was not on the disk."
        )
    if is_tag:
        return "the tag was known, but its manifest was not on the disk: evicted, or removed (rm)."
    if pull.is_fetched_elsewhere:
        return "it was not on the disk, and another process of the mirror fetched it."
    if pull.is_known:
        return (
            "an image of this repository refers to it, but it was not on the disk: it was not "
            "pulled yet, or was evicted or removed (rm, prune)."
        )
    return "this repository had not pulled it, or was told to forget it (rm, prune, forget)."


def _revalidation_reason(pull: StoredPull) -> str:
    if pull.tag_age is None:
        return "it was on the disk, and the upstream confirmed that this repository may have it."
    why = "pull_policy demands a check at each pull"
    if pull.tag_ttl is not None:
        why = f"tag_ttl is {_time(pull.tag_ttl)}"
    result = "named the same digest"
    if pull.digest and pull.digest != pull.previous_digest:
        was, now = _short(pull.previous_digest), _short(pull.digest)
        result = f"named another digest ({now} in place of {was}), which was on the disk"
    return (
        f"the tag was last confirmed {_ago(pull.tag_age)}, and {why}. "
        f"The upstream was asked, and {result}."
    )


def _times(pull: StoredPull) -> Iterator[str]:
    """Say how long each stage took."""
    texts = {
        "token": "for a token",
        "resolve": "for the upstream to name the tag's digest",
        "upstream": "for the upstream to confirm access",
        "wait": "for the first byte of the fetch",
        "fetch": "for the manifest",
        "index": "for the index",
    }
    waits = [
        f"{_time(pull.stages[name])} {text}"
        for name, text in texts.items()
        if pull.stages.get(name, 0.0) >= _SHOWN_S
    ]
    if waits:
        part = ""
        if pull.stages.get("token", 0.0) >= _SHOWN_S and len(waits) > 1:
            part = " (the token is a part of the next one)"
        yield f"Waited {', '.join(waits)}{part}."


def _rates(pull: StoredPull) -> Iterator[str]:
    """Say how fast the upstream and the client were, and which of them was the bottleneck."""
    if pull.fetched_bytes >= _RATED_BYTES and pull.fetched_seconds >= _RATED_S:
        by = f" by {pull.connections} connections" if pull.connections > 1 else ""
        rate = _rate(pull.fetched_bytes, pull.fetched_seconds)
        yield f"The upstream sent {rate}{by}."
    if pull.late_parts:
        parts = count_text(pull.late_parts, "part")
        verb = "was" if pull.late_parts == 1 else "were"
        yield f"{parts} arrived too slowly, and {verb} requested again."
    sending = pull.stages.get("send", 0.0)
    if pull.bytes_sent < _RATED_BYTES or sending < _RATED_S:
        return
    if pull.source_wait >= _UPSTREAM_SHARE * sending:
        share = f"{_time(pull.source_wait)} of {_time(sending)}"
        if pull.fetched_bytes:
            yield f"The client waited for bytes for {share}: the upstream is the bottleneck."
        else:
            source = "another process's fetch" if pull.is_fetched_elsewhere else "the disk"
            yield f"The client waited for {source} for {share}."
        return
    if pull.outcome == Outcome.ERROR:
        return  # It was not the client that ended it.
    rate = _rate(pull.bytes_sent, sending - pull.source_wait)
    yield f"The client read {rate}: the client, or its network, is the bottleneck."


def _end(pull: StoredPull) -> Iterator[str]:
    if pull.error == "client left":
        got = size_text(pull.bytes_sent)
        total = "" if pull.size is None else f" of {size_text(pull.size)}"
        yield f"The client left after {_time(pull.duration)}, with {got}{total}."


def _short(digest: str) -> str:
    return digest[:_SHOWN_DIGEST_CHARS]


def _rate(size: int, seconds: float) -> str:
    rate = size / max(seconds, 1e-3) / _MEGABYTE
    return f"{rate:.0f} MB/s" if rate >= 10 else f"{rate:.1f} MB/s"


def _ago(seconds: float) -> str:
    if seconds < 0:
        return "at a time that is still to come (the clock was set back)"
    return f"{_time(seconds)} ago"


def _time(seconds: float) -> str:
    """Return a duration: milliseconds, seconds, minutes, hours or days."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds * 1000:.0f} ms"
