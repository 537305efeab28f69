"""The rows: all that was measured is kept, and a row of another version is read."""

from __future__ import annotations

import json
from dataclasses import fields

from mirror.history.stored_pull import StoredPull
from mirror.observability.events import Outcome, RequestRecord
from mirror.observability.traces import FetchProgress, PullTrace
from tests.unit.history.kit import a_pull

NOT_KEPT = {"ns", "bytes_received", "is_sent_in_one_write", "is_unverified", "started", "trace"} | {
    "is_private",
    "is_pull_refused",
}
"""Fields of a record that say nothing later, or become others."""


def test_each_field_of_a_record_and_its_trace_is_kept() -> None:
    kept = {field.name for field in fields(StoredPull)}
    assert {field.name for field in fields(RequestRecord)} - kept == NOT_KEPT
    assert {field.name for field in fields(PullTrace)} - kept == {"progress"}


def test_stages_of_the_same_name_add_up_and_the_fetch_has_a_duration() -> None:
    progress = FetchProgress(began=100.0, latest=104.0, bytes=8)
    trace = PullTrace(size=9, is_known=True, source_wait=1.5, progress=progress)
    pull = a_pull(stages=[("index", 0.25), ("wait", 1.0), ("index", 0.5)], trace=trace)
    stored = StoredPull.of_record(pull, 5.0)
    assert stored.stages == {"index": 0.75, "wait": 1.0}
    assert (stored.at, stored.size, stored.is_known, stored.source_wait) == (5.0, 9, True, 1.5)
    assert (stored.fetched_bytes, stored.fetched_seconds) == (8, 4.0)


def test_row_is_read_as_it_was_written() -> None:
    stored = StoredPull.of_record(a_pull(outcome=Outcome.MISS, stages=[("wait", 1.0)]), 5.0)
    read = StoredPull.load(7, stored.dump())
    assert read is not None
    assert (read.row_id, read.to_json()) == (7, stored.to_json())


def test_unknown_fields_are_passed_over_and_malformed_rows_are_none() -> None:
    assert StoredPull.load(1, json.dumps({"at": 1.0, "request_id": "x", "new": 1})) is not None
    for text in ("", "[]", "null", "{"):
        assert StoredPull.load(1, text) is None


def test_long_texts_of_clients_are_cut() -> None:
    stored = StoredPull.of_record(a_pull(user_agent="x" * 10_000, error="y" * 10_000), 0.0)
    assert len(stored.dump()) < 3_000


def test_name_is_that_of_the_image_or_the_path() -> None:
    tag = a_pull(reference="latest")
    assert StoredPull.of_record(tag, 0.0).name == "docker.io/library/app:latest"
    digest = a_pull(reference="sha256:aa")
    assert StoredPull.of_record(digest, 0.0).name == "docker.io/library/app@sha256:aa"
    other = a_pull(repository="", path="/v3/?x=1")
    assert StoredPull.of_record(other, 0.0).name == "/v3/"
