"""The sentences about one request: the reason for its outcome, its times, and the bottleneck."""

from __future__ import annotations

from typing import Any

import pytest

from mirror.history.sentences import explain
from mirror.history.stored_pull import StoredPull
from mirror.observability.events import Outcome

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
MIB = 1 << 20
BLOB = {"kind": "blob", "reference": A, "digest": A}
TAG = {"kind": "manifest", "reference": "latest", "digest": B}


def stored(**fields: Any) -> StoredPull:
    given = {"at": 0.0, "request_id": "id", "method": "GET", "upstream": "docker.io"}
    return StoredPull(**{**given, "repository": "library/app", **fields})


def test_frozen_tag_is_named_before_the_hit() -> None:
    frozen, hit = explain(stored(**TAG, outcome="hit", is_frozen=True))
    assert frozen.startswith("The tag is frozen")
    assert hit.startswith("Hit")


def test_content_that_was_not_stored_is_said_with_the_reason() -> None:
    _, uncached = explain(stored(**BLOB, outcome="miss", uncached="full"))
    assert "not stored: there was no room on the disk" in uncached


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**BLOB, "outcome": "hit"}, "Hit: it was on the disk, and the upstream was not asked."),
        (
            {**BLOB, "outcome": "join", "joined_at_byte": 34 * MIB, "size": 100 * MIB},
            "Join: another request was fetching it already. Joined at 34 % (34.0MiB of 100.0MiB).",
        ),
        (
            {**BLOB, "outcome": "join", "joined_at_byte": 0},
            "Join: another request was fetching it already, and had 0B.",
        ),
        (
            {**TAG, "outcome": "miss"},
            (
                "Miss: the tag was not known: it was not pulled here before, or was removed (rm,"
                " prune)."
            ),
        ),
        (
            {**TAG, "outcome": "miss", "previous_digest": A},
            (
                "Miss: the tag had moved from sha256:aaaaaaaaaaaa to sha256:bbbbbbbbbbbb, which was"
                " not on the disk."
            ),
        ),
        (
            {**TAG, "outcome": "miss", "previous_digest": B},
            (
                "Miss: the tag was known, but its manifest was not on the disk: evicted, or removed"
                " (rm)."
            ),
        ),
        (
            {**BLOB, "outcome": "miss", "is_known": True},
            (
                "Miss: an image of this repository refers to it, but it was not on the disk: it was"
                " not pulled yet, or was evicted or removed (rm, prune)."
            ),
        ),
        (
            {**BLOB, "outcome": "miss", "is_known": True, "is_damaged": True},
            (
                "Miss: it was on the disk, and damaged: it was moved to quarantine/, and fetched"
                " again."
            ),
        ),
        (
            {**BLOB, "outcome": "miss"},
            (
                "Miss: this repository had not pulled it, or was told to forget it (rm, prune,"
                " forget)."
            ),
        ),
        (
            {**BLOB, "outcome": "miss", "bytes_sent": 5},
            "Miss: it was not on the disk, and another process of the mirror fetched it.",
        ),
        (
            {**BLOB, "outcome": "aside", "aside_bytes": 3 * MIB},
            (
                "Aside: the range was far ahead of the fetch of its blob, so it was requested by"
                " itself (3.0MiB). It is not stored."
            ),
        ),
        (
            {**TAG, "outcome": "revalidated", "tag_age": 400.0, "tag_ttl": 300.0}
            | {"previous_digest": B},
            (
                "Revalidated: the tag was last confirmed 7 min ago, and tag_ttl is 5 min. The"
                " upstream was asked, and named the same digest."
            ),
        ),
        (
            {**TAG, "outcome": "revalidated", "tag_age": 4.0, "previous_digest": A},
            (
                "Revalidated: the tag was last confirmed 4.0 s ago, and pull_policy demands a check"
                " at each pull. The upstream was asked, and named another digest"
                " (sha256:bbbbbbbbbbbb in place of sha256:aaaaaaaaaaaa), which was on the disk."
            ),
        ),
        (
            {**BLOB, "outcome": "revalidated"},
            (
                "Revalidated: it was on the disk, and the upstream confirmed that this repository"
                " may have it."
            ),
        ),
        (
            {**TAG, "outcome": "stale", "warning": "the upstream timed out", "tag_age": 7200.0},
            (
                "Stale: the cached copy was served (serve_stale), because the upstream timed out."
                " It was last confirmed 2 h ago."
            ),
        ),
        (
            {**TAG, "outcome": "negative", "error": "MANIFEST_UNKNOWN: no such manifest"},
            "Not found: MANIFEST_UNKNOWN: no such manifest.",
        ),
        (
            {**TAG, "outcome": "pushed"},
            "Pushed: it is a step of a push to a hosted repository, or its end.",
        ),
        (
            {**TAG, "outcome": "deleted"},
            "Deleted: a client deleted it from a hosted repository.",
        ),
        (
            {**TAG, "outcome": "denied", "error": "DENIED: not allowed."},
            "Refused: DENIED: not allowed.",
        ),
        (
            {"outcome": "rejected", "error": "NAME_INVALID: bad"},
            "Rejected: the request itself was wrong: NAME_INVALID: bad.",
        ),
        (
            {**TAG, "outcome": "stale", "warning": "it timed out", "tag_age": -9.0},
            (
                "Stale: the cached copy was served (serve_stale), because it timed out. It was last"
                " confirmed at a time that is still to come (the clock was set back)."
            ),
        ),
        ({**TAG, "outcome": "error"}, "Failed: no reason was recorded."),
        ({**TAG, "outcome": "of a later version"}, "Failed: no reason was recorded."),
    ],
)
def test_first_sentence_says_why_the_outcome_was_this_one(
    fields: dict[str, Any], reason: str
) -> None:
    assert explain(stored(**fields)) == [reason]


def test_each_outcome_has_a_reason() -> None:
    for outcome in Outcome:
        (reason, *_) = explain(stored(**BLOB, outcome=outcome.value, warning="x", error="y"))
        assert len(reason) >= 10


def test_waits_are_told_in_their_order_and_short_ones_are_left_out() -> None:
    stages = {"wait": 0.4, "token": 0.2, "index": 0.001, "resolve": 0.3}
    assert explain(stored(**TAG, outcome="miss", stages=stages))[1:] == [
        (
            "Waited 200 ms for a token, 300 ms for the upstream to name the tag's digest, 400 ms"
            " for the first byte of the fetch (the token is a part of the next one)."
        )
    ]


def test_client_that_reads_slowly_is_the_bottleneck() -> None:
    pull = stored(
        **BLOB,
        outcome="join",
        joined_at_byte=34 * MIB,
        size=100 * MIB,
        bytes_sent=100_000_000,
        fetched_bytes=82_000_000,
        fetched_seconds=2.0,
        connections=4,
        late_parts=2,
        stages={"send": 8.4},
        source_wait=0.1,
    )
    assert explain(pull)[1:] == [
        "The upstream sent 41 MB/s by 4 connections.",
        "2 parts arrived too slowly, and were requested again.",
        "The client read 12 MB/s: the client, or its network, is the bottleneck.",
    ]


def test_upstream_that_sends_slowly_is_the_bottleneck() -> None:
    given = {"bytes_sent": 10_000_000, "fetched_bytes": 10_000_000, "fetched_seconds": 5.0}
    pull = stored(**BLOB, outcome="miss", **given, stages={"send": 5.0}, source_wait=4.8)
    assert explain(pull)[1:] == [
        "The upstream sent 2.0 MB/s.",
        "The client waited for bytes for 4.8 s of 5.0 s: the upstream is the bottleneck.",
    ]


def test_client_is_no_bottleneck_of_a_response_that_the_upstream_has_broken() -> None:
    given = {"bytes_sent": 10_000_000, "stages": {"send": 13.2}, "source_wait": 4.9}
    pull = stored(**BLOB, outcome="error", error="connection refused", **given)
    assert explain(pull)[1:] == []


def test_wait_for_another_process_and_for_the_disk_are_told_apart() -> None:
    given = {**BLOB, "bytes_sent": 10_000_000, "stages": {"send": 5.0}, "source_wait": 4.8}
    assert explain(stored(**given, outcome="join"))[-1] == (
        "The client waited for another process's fetch for 4.8 s of 5.0 s."
    )
    assert explain(stored(**given, outcome="hit"))[-1] == (
        "The client waited for the disk for 4.8 s of 5.0 s."
    )


def test_small_or_quick_responses_have_no_rate() -> None:
    small = {"bytes_sent": 1000, "stages": {"send": 5.0}}
    quick = {"bytes_sent": 50 * MIB, "stages": {"send": 0.05}}
    for fields in (small, quick):
        assert len(explain(stored(**BLOB, outcome="hit", **fields))) == 1


def test_client_that_left_is_told_with_its_bytes() -> None:
    pull = stored(
        **BLOB, outcome="hit", error="client left", duration=90.0, bytes_sent=3 * MIB, size=9 * MIB
    )
    assert explain(pull)[-1] == "The client left after 90 s, with 3.0MiB of 9.0MiB."
